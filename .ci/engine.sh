# shellcheck shell=bash
# Sourced by .ci/run and .ci/same_image: a Docker engine of its own when none answers (Debian, as root), a base image
# when none can be pulled, and builds. Nothing of it outlives stop_engine.

engine_dir= # set while an engine of ours runs
engine_pid=

docker_client() { # Debian's builds with BuildKit; another one earlier on the PATH may lack it
    if [[ -x /usr/bin/docker ]]; then echo /usr/bin/docker; else type -P docker; fi
}

docker() {
    DOCKER_BUILDKIT=1 "$(docker_client)" "$@"
}

install_missing() { # PROGRAM=PACKAGE...
    local pair packages=()
    for pair in "$@"; do
        type -P "${pair%%=*}" >/dev/null || packages+=("${pair#*=}")
    done
    ((${#packages[@]})) || return 0
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"
}

start_engine() { # DIR: an existing folder that the engine may fill
    local tries
    install_missing dockerd=docker.io
    if docker version >/dev/null 2>&1; then return; fi
    engine_dir=$1
    mkdir "$engine_dir/exec"
    export DOCKER_HOST=unix://$engine_dir/docker.sock
    # No bridge and no firewall rules: builds use the machine's network, runs have none.
    dockerd --data-root "$engine_dir/data" --exec-root "$engine_dir/exec" --pidfile "$engine_dir/pid" \
        --host "$DOCKER_HOST" --bridge none --iptables=false --ip-masq=false >"$engine_dir/log" 2>&1 &
    engine_pid=$!
    for ((tries = 0; tries < 60; tries++)); do
        if docker version >/dev/null 2>&1; then return; fi
        kill -0 "$engine_pid" 2>/dev/null || break
        sleep 1
    done
    tail -n 20 "$engine_dir/log" >&2
    echo "the Docker engine did not start; see above" >&2
    return 1
}

stop_engine() { # safe to call at any time
    local mount
    [[ -n $engine_dir ]] || return 0
    if [[ -n $engine_pid ]]; then
        kill "$engine_pid" 2>/dev/null || true
        wait "$engine_pid" || true
    fi
    while read -r _ mount _; do
        if [[ $mount == "$engine_dir"/* ]]; then umount -l "$mount"; fi
    done < <(tac /proc/mounts)
    rm -rf "$engine_dir"
    engine_dir=
}

pull_or_make_base() { # DOCKERFILE: sets base_image to the public default or, without a registry, to one made here
    base_image=$(sed -n 's/^ARG BASE_IMAGE=//p' "$1")
    if timeout 120 "$(docker_client)" pull --quiet "$base_image"; then return; fi
    base_image=local/debian:bookworm
    install_missing mmdebstrap=mmdebstrap
    mmdebstrap --quiet --variant=minbase bookworm - | docker import - "$base_image"
}

build_image() { # TAG CONTEXT LOG [OPTION...]: says nothing unless it fails
    local tag=$1 context=$2 log=$3
    shift 3
    docker build --progress plain --network host --build-arg "BASE_IMAGE=$base_image" --tag "$tag" "$@" "$context" \
        >"$log" 2>&1 || {
        tail -n 40 "$log" >&2
        return 1
    }
}
