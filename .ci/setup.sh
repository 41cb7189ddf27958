#!/usr/bin/env bash
# Makes the virtual environment from requirements.lock: setup.sh FOLDER STAMP
# The stamp is written last. An environment whose making was cut off is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1 stamp=$2
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"sidrl needs Python 3.11 or newer, and this is {sys.version.split()[0]} ({sys.executable}); "
             "name another one: make setup PYTHON=python3.11")
PY

# One setup at a time; a second one waits, and finds the work done.
exec 9<requirements.lock
if command -v flock >/dev/null; then flock 9; fi
if [ -e "$stamp" ]; then exit 0; fi

moved=$(cat "$venv/.folder" 2>/dev/null || pwd) # scripts inside name the folder they were made in
if [ -e "$venv/.unfinished" ] || [ "$moved" != "$(pwd)" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
touch "$venv/.unfinished"
rm -f "$venv"/.done-*
pip() { "$venv/bin/python" -m pip "$@"; }
install() { pip install -qq --no-deps --no-compile "$@"; }

# The CPU build of torch is on PyTorch's own index where the configured one does not have it.
torch=$(grep '^torch==' requirements.lock)
echo "installing $torch"
install "$torch" 2>/dev/null || install --index-url https://download.pytorch.org/whl/cpu "$torch"
echo "installing the rest of requirements.lock"
install -r requirements.lock
install --no-build-isolation --config-settings editable_mode=compat --editable .

# What the lock does not name goes: leftovers of an earlier lock, and packages known to break the CPU build.
"$venv/bin/python" - <<'PY' | xargs -r "$venv/bin/python" -m pip uninstall --quiet --yes
import re
from importlib.metadata import distributions
from pathlib import Path

def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

locked = {canonical(line.split("==")[0]) for line in Path("requirements.lock").read_text().splitlines() if "==" in line}
print(*sorted({canonical(d.metadata["Name"]) for d in distributions()} - locked - {"pip", "sidrl"}))
PY
"$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true # some packages ship files for other Pythons
pwd >"$venv/.folder"
rm -f "$venv/.unfinished"
touch "$stamp"
echo "ready: $venv"
