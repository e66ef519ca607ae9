#!/usr/bin/env bash
# Print the path of a Python that can run this project, or say which one to install.
#
# A name proves little: a pyenv shim exists for versions that are not selected, and Debian's python3
# may come without venv. So a candidate is believed only after it has run.
set -u

# torch 2.11 has wheels up to 3.14; megatron-core 0.19 needs 3.12.
readonly VERSIONS="3.12 3.13 3.14"
rejected=""

believe() { # PATH: prints it and ends the search if it will do, else notes why not
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null)
    case " $VERSIONS " in
        *" ${version:-none} "*) ;;
        *) rejected+="  $1: ${version:+is Python }${version:-does not run}"$'\n'; return ;;
    esac
    if ! "$1" -c 'import venv, ensurepip' 2>/dev/null </dev/null; then
        rejected+="  $1: Python $version without venv (Debian, Ubuntu: apt-get install python$version-venv)"$'\n'
        return
    fi
    echo "$1"
    exit 0
}

ask_uv() {
    command -v uv >/dev/null || return
    local found
    found=$(uv python find --system --no-python-downloads '>=3.12,<3.15' 2>/dev/null </dev/null)
    if [ -z "$found" ]; then
        echo "No Python 3.12 to 3.14 is installed; asking uv for 3.12." >&2
        uv python install 3.12 >&2 </dev/null
        found=$(uv python find --system --no-python-downloads 3.12 2>/dev/null </dev/null)
    fi
    if [ -n "$found" ]; then
        believe "$found"
    else
        rejected+="  uv: has none and could not install one"$'\n'
    fi
}

if [ -n "${PYTHON:-}" ]; then
    if chosen=$(command -v "$PYTHON"); then
        believe "$chosen"
    else
        rejected="  $PYTHON: no such program"$'\n'
    fi
else
    for version in $VERSIONS; do
        while read -r path; do believe "$path"; done < <(type -aP "python$version")
        for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
            for path in "$root/versions/$version".*/bin/python3; do
                [ -x "$path" ] && believe "$path"
            done
        done
    done
    while read -r path; do believe "$path"; done < <(type -aP python3 python)
    ask_uv
fi

cat >&2 <<EOF
No Python 3.12, 3.13 or 3.14 was found. Looked at PYTHON=${PYTHON:-(not set)}, PATH, pyenv and uv:
${rejected:-  nothing there
}Install one, then give the same command again:
  Debian 13, Ubuntu 24.04   sudo apt-get install python3 python3-venv
  Fedora                    sudo dnf install python3.12
  macOS (Homebrew)          brew install python@3.12
  pyenv                     pyenv install 3.12
  uv                        uv python install 3.12
A Python elsewhere can be named: make test PYTHON=/path/to/python3.12
EOF
exit 1
