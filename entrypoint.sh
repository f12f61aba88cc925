#!/usr/bin/env bash
# Verb -> command, the same in the image and on a bare machine.
# ./entrypoint.sh VERB [--option value] [section.key=value]; with no verb it prints what there is.
set -euo pipefail

top=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
export PYTHONPATH=$top/code:$top
# A read-only root without --tmpfs /tmp still has /dev/shm.
[[ -w ${TMPDIR:-/tmp} ]] || export TMPDIR=/dev/shm

die() { # STATUS MESSAGE
    echo "entrypoint.sh: $2" >&2
    exit "$1"
}

find_python() {
    local candidate
    for candidate in python3.11 python3; do
        # Debian ships venv without ensurepip; asking for both here saves a half-made environment later.
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die 2 "needs Python 3.11 with venv; on Debian 12: apt-get install python3 python3-venv"
}

is_made() { # the stamp comes last, so an interrupted installation never looks finished
    [[ -x $venv/bin/python && $(cat "$venv/lock.sha256" 2>/dev/null) == "$lock_sum" ]]
}

attempt() { # COMMAND...: runs it into the log; one line when it fails
    "$@" >>"$log" 2>&1 || die 1 "failed: $*; see $log"
}

fill_venv() { # BASE_PYTHON. Everything goes but the lock file that others may be waiting on.
    local base=$1 log=$venv/setup.log pip_options=(--no-deps --require-hashes --no-input)
    echo "entrypoint.sh: making .venv from code/requirements.lock, once, a few minutes; log: $log" >&2
    find "$venv" -mindepth 1 -maxdepth 1 ! -name setup.flock -exec rm -rf {} +
    if compgen -G "$top/code/wheelhouse/*.whl" >/dev/null; then
        pip_options+=(--no-index --find-links "$top/code/wheelhouse")
    fi
    attempt "$base" -m venv "$venv"
    attempt "$venv/bin/python" -m pip install "${pip_options[@]}" -r "$lock"
    echo "$lock_sum" >"$venv/lock.sha256"
}

make_venv() { # one at a time; who waited finds it made
    local base
    base=$(find_python)
    mkdir -p "$venv" || die 2 "cannot write $venv; use a writable checkout or set TONGKUAN_PYTHON"
    {
        flock --nonblock 9 || { echo "entrypoint.sh: waiting for another first use to make .venv" >&2 && flock 9; }
        is_made || fill_venv "$base"
    } 9>>"$venv/setup.flock"
}

run_tests() { # [PYTEST_ARGUMENT...]
    types=  # global: the trap outlives this function
    local argument config=$top/code/pyproject.toml tests=("$top/code/tests") workers cache status=0
    workers=(--numprocesses "$("$python" -P "$top/code/tongkuan/base/machine.py")" --dist worksteal)
    if [[ -n ${venv:-} ]]; then
        cache=$venv/cache
    else # in the image nothing outlives the container
        cache=$(mktemp -d)
    fi
    # Test files named by the user replace the whole suite.
    for argument in "$@"; do
        if [[ $argument == *.py || $argument == *.py::* ]]; then tests=() workers=(); fi
    done
    export HYPOTHESIS_STORAGE_DIRECTORY=$cache/hypothesis MYPYPATH=$top/code

    # From the top, so that messages name short paths; pytest takes its paths from where the user stands.
    (
        cd "$top"
        options=(--quiet --no-cache --config code/pyproject.toml code data_scripts submit/similarity.py)
        "$python" -P -m ruff format --check "${options[@]}"
        "$python" -P -m ruff check "${options[@]}"
    )
    # Beside the tests: its first run takes a minute on one core. What is in the image was checked before it was built.
    if [[ -z ${TONGKUAN_IMAGE:-} ]]; then
        (
            cd "$top"
            exec "$python" -P -m mypy --strict --config-file code/pyproject.toml --cache-dir "$cache/mypy" \
                code/tongkuan data_scripts
        ) &
        types=$!
        trap 'kill "$types" 2>/dev/null || true' EXIT
    fi
    "$python" -P -m pytest -c "$config" --rootdir "$top/code" -p no:cacheprovider -m "not slow" \
        "${workers[@]}" "${tests[@]}" "$@" || status=$?
    [[ -z $types ]] || wait "$types" || status=1
    exit "$status"
}

python=${TONGKUAN_PYTHON:-}
if [[ -z $python ]]; then
    venv=$top/.venv
    lock=$top/code/requirements.lock
    lock_sum=$(sha256sum <"$lock")
    if is_made; then
        python=$venv/bin/python
    elif [[ -z ${1:-} || $1 == -h || $1 == --help || $1 == help ]]; then
        python=$(find_python) # saying what there is needs no library
    else
        make_venv
        python=$venv/bin/python
    fi
elif [[ ! -x $python ]]; then
    die 2 "TONGKUAN_PYTHON=$python is no program; unset it to let .venv be made"
fi

case ${1:-} in
    test) run_tests "${@:2}" ;;
    # -P: a numpy.py in the user's folder must not stand in for ours.
    *) exec "$python" -P -m tongkuan "$@" ;;
esac
