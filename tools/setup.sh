#!/bin/sh
# Makes the virtual environment in .venv:   tools/setup.sh demo|docs|test
#
# Called by the Makefile. Installs what `make demo`, `docs` or `test` needs; `test` includes the others. As root on Debian
# and its relatives, missing system packages are installed; elsewhere a message names what to install.
# Variables: PYTHON (the interpreter to use), TORCH (what to give to pip; empty for none).
set -eu

cd "$(dirname "$0")/.."
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
WHAT=$1
VENV=.venv
TORCH=${TORCH-torch==2.13.0}

say() { printf '%s\n' "raylaunch: $*" >&2; }

fail() {
    say "$@"
    exit 1
}

# Whether $1 runs, and is a Python that raylaunch and the Ray release it uses support.
fits() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON-}" ]; then
        fits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python from 3.10 to 3.14."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.13 python3.10 python3.14 python /usr/bin/python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[0-4]*/bin/python3; do
        if fits "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    if command -v python3 >/dev/null; then
        fail "needs Python 3.10 to 3.14; python3 here is $(python3 -c 'import platform; print(platform.python_version())')." \
            "Install a newer one (Debian 12 and Ubuntu 22.04 have it as the package python3), or name it: make PYTHON=/path/to/python3"
    fi
    fail "found no python3. Install Python 3.10 or newer: 'sudo apt-get install python3 python3-venv' on Debian and Ubuntu," \
        "'sudo dnf install python3' on Fedora, 'brew install python' on macOS."
}

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_install() {
    say "installing the system packages: $*"
    DEBIAN_FRONTEND=noninteractive apt-get update -qq || say "apt-get update did not fully succeed; continuing"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Debian ships ensurepip, which `python3 -m venv` needs, in a package of its own.
can_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

make_venv() {
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! can_venv "$1"; then
        if can_apt; then
            apt_install "python$version-venv" || apt_install python3-venv || true
        fi
        can_venv "$1" || fail "$1 cannot make virtual environments." \
            "Install its venv module: 'sudo apt-get install python$version-venv' on Debian and Ubuntu."
    fi
    say "creating $VENV with $("$1" --version 2>&1)"
    rm -rf "$VENV"
    "$1" -m venv "$VENV"
}

pip_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"; }

case $WHAT in demo | docs | test | machines) ;; *) fail "usage: tools/setup.sh demo|docs|test|machines" ;; esac

# Hosts for tests are made of namespaces, each with a real sshd; cron brings a cluster back when one "reboots", and
# faketime puts a clock wrong. None of their services is started on this machine, now or at its next boot.
get_machines() {
    needed=
    pairs="sshd:openssh-server ssh:openssh-client ip:iproute2 crontab:cron faketime:faketime"
    [ "$WHAT" != machines ] || pairs="$pairs systemd-nspawn:systemd-container" # the long tests alone boot a systemd
    for pair in $pairs; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || needed="$needed ${pair#*:}"
    done
    [ -n "$needed" ] || return 0
    if ! can_apt; then
        say "tests of hosts over SSH need$needed and will be skipped: sudo apt-get install$needed"
        return 0
    fi
    policy=/usr/sbin/policy-rc.d
    [ -e $policy ] && policy= || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy; }
    # shellcheck disable=SC2086 -- words
    apt_install $needed || say "could not install$needed; the tests that need them will be skipped."
    [ -z "$policy" ] || rm -f $policy
    case $needed in *openssh-server*) systemctl --quiet disable ssh 2>/dev/null || true ;; esac
}

if [ "$WHAT" = machines ]; then
    get_machines
    exit
fi

if ! fits "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    make_venv "$python"
fi

if [ "$WHAT" = test ]; then
    get_machines
    # First, before anything could ask for another PyTorch: only plain pip finds the build for CPUs where one is offered.
    if [ -n "$TORCH" ] && ! pip_install "$TORCH"; then
        say "could not install $TORCH; its tests will be skipped."
    fi
    say "installing raylaunch with what its tests need"
    pip_install -e '.[demo,dev,docs]'
    # A client that is not ours, for the tests of the MCP server. Without it they are skipped.
    tools/node.sh inspector @modelcontextprotocol/inspector@2.12.0 || say "could not install the MCP Inspector; its tests will be skipped."
else
    say "installing raylaunch with what make $WHAT needs (about a minute)"
    pip_install -e ".[$WHAT]"
fi
