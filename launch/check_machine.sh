#!/bin/sh
# Says what a machine lacks before anything is installed. Argument: the Python to use.
python=${1:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: $python is not Python 3.10 or newer ($("$python" --version 2>&1)): install one, or name it, as in: make PYTHON=python3.12 demo" >&2
    exit 2
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "error: $python cannot make virtual environments: install its venv module (Debian and Ubuntu: apt install python3-venv)" >&2
    exit 2
fi
for compiler in "${CXX:-c++}" g++ clang++; do
    command -v "$compiler" >/dev/null 2>&1 && exit 0
done
echo "error: no C++ compiler (looked for ${CXX:-c++}, g++ and clang++): DeepSpeed builds its CPU optimizer with one. Install it (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) and run make again" >&2
exit 2
