# docker build -t img . && docker run --gpus all img train
# Behind a company proxy add --secret id=ca,src=BUNDLE.pem; without a package index fill code/wheelhouse/ first; without
# an image registry name a local Debian 12 with --build-arg BASE_IMAGE=…
ARG BASE_IMAGE=debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716

# One system for build and run: the environment points at /usr/bin/python3, which must be the same on both sides.
FROM ${BASE_IMAGE} AS system
# What tells when and where it was installed goes: two builds of one commit have the same files.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 ca-certificates \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old /var/lib/dpkg/*-old

FROM system AS builder
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
ARG PIP_INDEX_URL
# Lock and wheelhouse are mounted, not copied: gigabytes of wheels never become a layer.
RUN --mount=type=secret,id=ca \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=code/wheelhouse,target=/wheelhouse \
    --mount=type=bind,source=code/requirements.lock,target=/requirements.lock \
    if [ -e /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca SSL_CERT_FILE=/run/secrets/ca; fi \
    && if ls /wheelhouse/*.whl >/dev/null 2>&1; then set -- --no-index --find-links /wheelhouse; fi \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --disable-pip-version-check --no-input --no-compile \
        --no-deps --require-hashes -r /requirements.lock "$@"
# Compiled by content, not by time, and a process a package: what one has compiled before shows in the bytes. Exit code
# 123: as always, some files are for other versions of Python.
RUN --mount=type=bind,source=code/tongkuan/base/machine.py,target=/machine.py \
    printf '%s\0' /opt/venv/lib/python3.11/site-packages/* \
    | PYTHONHASHSEED=0 xargs -0 -n 1 -P "$(python3 /machine.py)" \
        python3 -m compileall -qq -f --invalidation-mode checked-hash || [ $? = 123 ]
# What is in there and under which licence; without clock and serial number, and nothing compiled on the way.
RUN --mount=type=bind,source=code/pyproject.toml,target=/pyproject.toml \
    --mount=type=bind,source=code/licences.py,target=/licences.py \
    export PYTHONDONTWRITEBYTECODE=1 \
    && /opt/venv/bin/cyclonedx-py environment --output-reproducible --gather-license-texts \
        --pyproject /pyproject.toml --output-file /opt/sbom.cdx.json /opt/venv/bin/python \
    && /opt/venv/bin/python /licences.py /opt/sbom.cdx.json >/opt/licences.txt
# A CPU build of torch passes every test and then trains for a year; 0 lets it in on purpose.
ARG REQUIRE_CUDA=1
RUN [ "${REQUIRE_CUDA}" != 1 ] \
    || /opt/venv/bin/python -c 'import torch; assert torch.version.cuda, f"torch {torch.__version__} lacks CUDA"'

FROM system AS app
# The hub is off: what a run needs lies in weights/. HOME and USER serve any --user, also one without a passwd entry.
# PYTHONPATH is for `--entrypoint torchrun`; entrypoint.sh sets its own.
# With --network none the host has no name, and each rank would warn about that twice. By TONGKUAN_IMAGE errors know to
# say what to mount.
ENV TONGKUAN_PYTHON=/opt/venv/bin/python \
    TONGKUAN_IMAGE=1 \
    PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app/code:/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOME=/tmp \
    USER=tongkuan \
    TORCH_CPP_LOG_LEVEL=ERROR
WORKDIR /app
# Epoch 0: a password's day would stand in /etc/shadow.
RUN export SOURCE_DATE_EPOCH=0 \
    && groupadd --gid 10001 tongkuan \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin --no-log-init tongkuan
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder --chmod=444 /opt/sbom.cdx.json /opt/licences.txt ./
# --chmod: the image works for any UID whatever the umask of the checkout.
COPY --chmod=755 weights weights
# The bracket makes it a pattern, and a pattern may match nothing: data/ is copied when it is there.
COPY --chmod=755 dat[a] data
COPY --chmod=755 README.md README.zh.md LICENSE entrypoint.sh ./
COPY --chmod=755 submit submit
COPY --chmod=755 data_scripts data_scripts
# A folder mounted over submit/ hides its similarity.py; predict takes the spare one then.
COPY --chmod=755 submit/similarity.py code/
# By name, since code/ as a whole would bring the wheelhouse.
COPY --chmod=755 code/*.toml code/*.lock code/*.md code/*.py code/
COPY --chmod=755 code/presets code/presets
COPY --chmod=755 code/benchmarks code/benchmarks
COPY --chmod=755 code/docs code/docs
COPY --chmod=755 code/examples code/examples
COPY --chmod=755 code/tests code/tests
COPY --chmod=755 code/tongkuan code/tongkuan
# Compiled by content, not by time: the same bytes in every build. What the verbs write to is open to any
# UID, without the sticky bit, which would keep train from replacing a model that came with the image.
RUN python3 -m compileall -q --invalidation-mode checked-hash code data_scripts submit \
    && mkdir -p data runs \
    && chmod 777 data runs submit weights
USER 10001:10001
# A batch job: its exit code tells how it went, there is no service to ask.
HEALTHCHECK NONE
ENTRYPOINT ["/app/entrypoint.sh"]

# docker build --target test -t img-test . && docker run --rm img-test
FROM app AS test
CMD ["test"]

# Last, so that a plain build ends here.
FROM app AS runtime
ARG VERSION=
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="tongkuan" \
      org.opencontainers.image.description="Decides whether two shop listings sell the same product" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
