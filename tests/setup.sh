#!/bin/sh
# Installs a lock into the virtual environment that the Makefile uses: tests/setup.sh PYTHON VENV LOCK
#
# requirements.lock starts a new environment, with the package itself. requirements-dev.lock adds to it.
set -eu
python=$1
venv=$2
lock=$3
scratch=$(mktemp -d)
ticker=

fail() {
    echo "setup: $1" >&2
    exit 1
}

has() {
    command -v "$1" >/dev/null
}

stop_ticker() {
    [ -z "$ticker" ] || kill "$ticker" 2>/dev/null || :
    ticker=
}

# Prints the step and its seconds: every second on a terminal, every five seconds elsewhere.
tick() {
    seconds=0
    while kill -0 $$ 2>/dev/null; do
        if [ -t 2 ]; then
            printf '\r\033[Ksetup: %s, %s s' "$1" "$seconds" >&2
        elif [ $((seconds % 5)) -eq 0 ]; then
            echo "setup: $1, $seconds s" >&2
        fi
        sleep 1
        seconds=$((seconds + 1))
    done
}

# Runs a command and shows its output only if it fails: step TEXT COMMAND...
step() {
    tick "$1" &
    ticker=$!
    shift
    result=0
    "$@" >"$scratch/output" 2>&1 || result=$?
    stop_ticker
    [ ! -t 2 ] || echo >&2
    [ $result -eq 0 ] || cat "$scratch/output" >&2
    return $result
}

# A new Debian has python3 with neither pip nor ensurepip. Its package index serves pip as a wheel, to any user.
get_debian_pip() (
    mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial"
    cd "$scratch"
    set -- -qq -o "Dir::State::Lists=$scratch/lists" -o "Dir::Cache=$scratch/cache" -o APT::Sandbox::User=
    apt-get "$@" update && apt-get "$@" download python3-pip-whl && dpkg-deb -x python3-pip-whl_*.deb .
)

# Prints the folder with the wheel of pip that ensurepip would install: running the wheel takes a tenth of the time.
bundled_pip() {
    "$python" -c 'import ensurepip, sysconfig
print(sysconfig.get_config_var("WHEEL_PKG_DIR") or ensurepip.__path__[0] + "/_bundled")' 2>/dev/null
}

# Sets the wheel of pip that `pip` runs, unless the Python has pip.
find_pip() {
    pip_wheel=
    ! "$python" -c 'import pip' 2>/dev/null || return 0
    wheels=$(bundled_pip) || wheels=
    if [ -z "$wheels" ]; then
        has apt-get && has dpkg-deb || fail "$python has neither pip nor ensurepip; install them, or uv"
        step "getting pip from Debian" get_debian_pip ||
            fail "can't get pip; run: sudo apt-get install python3-venv"
        wheels=$scratch/usr/share/python-wheels
    fi
    for pip_wheel in "$wheels"/pip-*.whl; do :; done
}

pip() {
    if [ -n "$pip_wheel" ]; then
        "$venv/bin/python" "$pip_wheel/pip" "$@"
    else
        "$python" -m pip --python "$venv/bin/python" "$@"
    fi
}

# Installs the locked uv, which with its download is faster than pip is alone.
get_uv() {
    sed -n '/^uv==/,/^ *#/p' requirements-dev.lock >"$scratch/uv.lock"
    pip install --quiet --require-hashes --only-binary :all: --requirement "$scratch/uv.lock"
}

# Prints the index that pip is set up to use, which uv would not look at.
pip_index() {
    pip config list | sed -n "s/^.*\.index-url='\(.*\)'$/\1/p" | tail -n 1
}

install() {
    "$@" --require-hashes --requirement "$lock" || return
    [ "$lock" != requirements.lock ] || "$@" --no-deps --no-build-isolation --editable .
}

has "$python" || fail "$python was not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; Abreast needs Python 3.11 or newer (make PYTHON=/path/to/python3)"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 UV_PYTHON_DOWNLOADS=never UV_NATIVE_TLS=true
trap 'stop_ticker; rm -rf "$scratch"' EXIT
trap 'exit 130' HUP INT TERM

[ "$lock" != requirements.lock ] || step "making $venv" "$python" -m venv --clear --without-pip "$venv"
if has uv; then
    step "installing $lock with uv" install uv pip install --quiet --python "$venv/bin/python" ||
        fail "uv could not install $lock"
    exit
fi
find_pip
if [ -x "$venv/bin/uv" ] || step "getting uv" get_uv; then
    index=$(pip_index)
    [ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
    ! step "installing $lock with uv" install "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" || exit 0
fi
step "installing $lock with pip" install pip install --quiet || fail "pip could not install $lock"
