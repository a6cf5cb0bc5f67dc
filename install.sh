#!/usr/bin/env bash
# Makes .venv and installs the project into it, with uv when it is there, else with pip. Usage: install.sh [PYTHON]
# Without an NVIDIA GPU a CPU build of torch is preferred wherever one is at hand: in a folder that pip or uv is told
# to look in (PIP_FIND_LINKS, UV_FIND_LINKS), or through uv's own `--torch-backend`. Else it is the normal build.
set -euo pipefail
cd "$(dirname "$0")"
python=${1:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "Python 3.11 or newer is needed; \`$python\` is $("$python" --version 2>&1 || echo missing). Name one: make PYTHON=python3.12" >&2
    exit 2
}
# A dependency of GPTQModel (pypcre) has no wheel for some systems, and is then built from source.
failed() {
    include="$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
    if ! command -v "${CC:-cc}" >/dev/null; then
        missing="there is no C compiler"
    elif ! printf '#include <Python.h>\n' | "${CC:-cc}" -I"$include" -E - >/dev/null 2>&1; then
        missing="the headers of Python are missing"
    elif ! printf '#define PCRE2_CODE_UNIT_WIDTH 8\n#include <pcre2.h>\n' | "${CC:-cc}" -E - >/dev/null 2>&1; then
        missing="the headers of PCRE2 are missing"
    else
        exit 1
    fi
    echo "The installation failed, and $missing, which packages without a wheel need;" \
        "on Debian and Ubuntu: apt install build-essential python3-dev libpcre2-dev" >&2
    exit 1
}
torch=$(grep '^torch==' constraints.txt)
gpu=no
command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && gpu=yes

if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
    export VIRTUAL_ENV=$PWD/.venv
    links=()
    for folder in ${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}; do links+=(--find-links "$folder"); done
    if [ $gpu = no ]; then
        uv pip install --quiet ${links[@]+"${links[@]}"} "$torch+cpu" 2>/dev/null ||
            uv pip install --quiet --torch-backend cpu "$torch" 2>/dev/null ||
            uv pip install --quiet ${links[@]+"${links[@]}"} "$torch"
    else
        uv pip install --quiet "$torch"
    fi
    uv pip install --quiet ${links[@]+"${links[@]}"} --constraint constraints.txt --editable '.[dev]' || failed
    deepspeed=(uv pip install --quiet ${links[@]+"${links[@]}"})
else
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    if [ $gpu = no ]; then
        .venv/bin/pip install --quiet "$torch+cpu" 2>/dev/null || .venv/bin/pip install --quiet "$torch"
    else
        .venv/bin/pip install --quiet "$torch"
    fi
    .venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]' || failed
    deepspeed=(.venv/bin/pip install --quiet)
fi

# DeepSpeed is built here, with the torch that is installed. It is an extra: without it only `zero2` and `zero3` are missing.
[ $gpu = yes ] || export DS_ACCELERATOR=cpu
DS_BUILD_OPS=0 "${deepspeed[@]}" --no-build-isolation --constraint constraints.txt "$(grep '^deepspeed==' constraints.txt)" ||
    echo "DeepSpeed could not be installed; \`launch: {strategy: zero2}\` and \`zero3\` need it, and their tests are skipped" >&2
