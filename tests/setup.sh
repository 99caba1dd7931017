#!/bin/sh
# Makes the virtual environment that the Makefile uses: tests/setup.sh PYTHON VENV
set -eu
python=$1
venv=$2

fail() {
    echo "setup: $1" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "$python was not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; Abreast needs Python 3.11 or newer (make PYTHON=/path/to/python3)"

# A new Debian has python3 without venv's ensurepip. Root can mend that; others are told.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null && ! command -v uv >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing python3-venv" >&2
        (apt-get update && apt-get install -y --no-install-recommends python3-venv) >&2
    elif ! "$python" -m pip --version >/dev/null 2>&1; then
        fail "this Python can't make virtual environments; run: sudo apt-get install python3-venv"
    fi
fi

if command -v uv >/dev/null; then
    export UV_PYTHON_DOWNLOADS=never
    uv venv --quiet --clear --python "$python" "$venv"
    uv pip install --quiet --python "$venv/bin/python" --require-hashes --requirement requirements.lock
    uv pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation --editable .
elif "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
else
    "$python" -m venv --clear --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install --quiet --require-hashes --requirement requirements.lock
    "$python" -m pip --python "$venv/bin/python" install --quiet --no-deps --no-build-isolation --editable .
fi
