#!/bin/sh
# Prints the path of a Python >= 3.12 that can make a virtual environment; says the cure and exits 1 when there is none.
# A candidate counts only if it runs: a pyenv shim may be on the PATH and fail.
set -u

works() {
    "$1" -c '
import sys
ok = sys.version_info >= (3, 12) and sys.maxsize > 2**32 and sys.implementation.name == "cpython"
import ensurepip, ssl, venv
sys.exit(0 if ok else 1)' >/dev/null 2>&1 </dev/null
}

try() {
    if works "$1"; then
        # sys.executable: the program behind a shim or a link, which stays the same when PYENV_VERSION does not.
        "$1" -c 'import sys; print(sys.executable)' </dev/null
        exit 0
    fi
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    echo "PYTHON=$PYTHON does not run, is older than 3.12, or lacks ensurepip or ssl." >&2
    exit 1
fi

# 3.12 and 3.13 first: every dependency has wheels for them.
for name in python3.12 python3.13 python3.14 python3 python; do
    command -v "$name" >/dev/null 2>&1 && try "$name"
done

for root in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null </dev/null)" "${HOME:-}/.pyenv"; do
    [ -n "$root" ] || continue
    for version in 3.12 3.13 3.14; do
        for python in "$root"/versions/"$version" "$root"/versions/"$version".*; do
            [ -x "$python/bin/python" ] && try "$python/bin/python"
        done
    done
done

if command -v uv >/dev/null 2>&1; then
    python=$(uv python find --no-project --system '>=3.12' 2>/dev/null </dev/null) && [ -n "$python" ] && try "$python"
    echo "No Python >= 3.12 is installed; uv fetches 3.12." >&2
    uv python install 3.12 >&2 </dev/null
    python=$(uv python find --no-project --system '3.12' 2>/dev/null </dev/null) && [ -n "$python" ] && try "$python"
fi

cat >&2 <<'EOF'
No working Python >= 3.12 with venv and ensurepip was found (tried python3.12, python3.13, python3.14, python3, python,
pyenv's versions and uv). Install one of these ways and run the command again:
  Debian, Ubuntu:  sudo apt-get install python3.12 python3.12-venv
  macOS:           brew install python@3.12
  pyenv:           pyenv install 3.12
  uv:              curl -LsSf https://astral.sh/uv/install.sh | sh
or name one yourself: make serve PYTHON=/path/to/python3.12
EOF
exit 1
