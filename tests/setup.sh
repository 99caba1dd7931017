#!/bin/sh
# Makes the virtual environment that the Makefile uses: tests/setup.sh PYTHON VENV
set -eu
python=$1
venv=$2

fail() {
    echo "setup: $1" >&2
    exit 1
}

has() {
    command -v "$1" >/dev/null
}

# A new Debian has python3 with neither pip nor ensurepip. Its package index has pip as a wheel, and hands it to any user.
debian_pip() {
    draft=$(mktemp -d)
    trap 'rm -rf "$draft"' EXIT
    mkdir -p "$draft/lists/partial" "$draft/cache/archives/partial"
    echo "setup: this Python has no pip; getting Debian's" >&2
    (
        cd "$draft"
        set -- -qq -o "Dir::State::Lists=$draft/lists" -o "Dir::Cache=$draft/cache" -o APT::Sandbox::User=
        apt-get "$@" update
        apt-get "$@" download python3-pip-whl
        dpkg-deb -x python3-pip-whl_*.deb .
    ) >&2 || fail "pip could not be had; run: sudo apt-get install python3-venv"
    for pip in "$draft"/usr/share/python-wheels/pip-*.whl; do :; done
}

install_with() {
    "$@" install --quiet --require-hashes --requirement requirements.lock
    "$@" install --quiet --no-deps --no-build-isolation --editable .
}

has "$python" || fail "$python was not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; Abreast needs Python 3.11 or newer (make PYTHON=/path/to/python3)"
export PIP_DISABLE_PIP_VERSION_CHECK=1 UV_PYTHON_DOWNLOADS=never

if has uv; then
    uv venv --quiet --clear --python "$python" "$venv"
    export VIRTUAL_ENV="$PWD/$venv"
    install_with uv pip
elif "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
    install_with "$venv/bin/python" -m pip
elif "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear --without-pip "$venv"
    install_with "$python" -m pip --python "$venv/bin/python"
elif has apt-get && has dpkg-deb; then
    debian_pip
    "$python" -m venv --clear --without-pip "$venv"
    install_with "$venv/bin/python" "$pip/pip"
else
    fail "$python has neither pip nor ensurepip; install them, or uv"
fi
