# Environments with one release each of Python, torch and what builds on it. Sourced, with bash.

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
environment="$scratch/python"
# Compiled code, pip's files and the tests' own are gigabytes a stack, so they go with it.
export TMPDIR="$scratch/tmp" XDG_CACHE_HOME="$scratch/cache" PIP_NO_CACHE_DIR=1
export PATH="$environment/bin:$PATH"

# interpreter VERSION: the Python of that version, on the path or beside the one that is (as pyenv has them).
interpreter() {
    local candidate beside
    beside="$(dirname "$(python3 -c 'import sys; print(sys.base_prefix)')")"
    for candidate in "python$1" "$beside/$1".*/bin/python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        if "$candidate" -c '' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python $1 is not installed here" >&2
    return 1
}

# stack VERSION ARGUMENTS...: an environment with that Python and what pip installs, and nothing else.
stack() {
    local python
    python="$(interpreter "$1")"
    rm -rf "${scratch:?}"/*
    mkdir "$TMPDIR" "$XDG_CACHE_HOME"
    shift
    "$python" -m venv "$environment"
    "$environment/bin/pip" install -q "$@"
    "$environment/bin/python" -c 'import platform, torch, transformers as t
print("Python", platform.python_version(), "torch", torch.__version__, "transformers", t.__version__)'
}

tests() {
    "$environment/bin/python" -m pytest -q -n auto --dist worksteal "$@"
}
