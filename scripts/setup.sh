#!/usr/bin/env bash
# Installs what building, running and (with --tests) testing strobe needs, on a Debian 12 machine. Safe to run again: what is
# there already is left alone. Packages come from Debian and from the Python package index; Python packages go to .venv,
# cuBLASLt's header to .deps where the CUDA toolkit lacks it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

want_tests=no
want_cuda=no
for arg in "$@"; do
    case "$arg" in
        --tests) want_tests=yes ;;
        --cuda) want_cuda=yes ;;
        *) echo "setup.sh: unknown argument '$arg'; possible: --tests, --cuda" >&2; exit 2 ;;
    esac
done

packages=(build-essential cmake ninja-build ccache pkg-config git ca-certificates
          libfmt-dev libcli11-dev nlohmann-json3-dev libpcre2-dev libopenblas-dev bible-kjv-text)
if [ "$want_tests" = yes ]; then
    packages+=(python3 python3-dev python3-venv libgtest-dev clang libclang-rt-14-dev)
elif [ "$want_cuda" = yes ]; then
    packages+=(python3 python3-venv)
fi

missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    echo "setup: installing ${missing[*]}"
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || { echo "setup: need root or sudo to install: ${missing[*]}" >&2; exit 1; }
        as_root=(sudo)
    fi
    log=$(mktemp)
    if ! { "${as_root[@]}" apt-get update -qq &&
           "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
           >"$log" 2>&1; then
        cat "$log" >&2
        echo "setup: apt-get could not install: ${missing[*]}" >&2
        exit 1
    fi
    rm -f "$log"
fi

# A virtual environment is complete when it was made from the requirements as they are now.
python_env() {
    local requirements=$1 stamp=.venv/.installed-$(basename "$1")
    [ -x .venv/bin/python ] || python3 -m venv .venv
    if ! cmp -s "$requirements" "$stamp"; then
        echo "setup: installing Python packages of $requirements into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        cp "$requirements" "$stamp"
    fi
}

# cuBLASLt's header, where the CUDA toolkit came without it: out of the wheel that also carries the library.
cublas() {
    local version=13.0.2.14 sha256=0cf238ffdbe46c00cb9aa98e7bca745c223a5ca5a53e686ac8b3e5a08fe80d6c target=.deps/cublas-13.0.2.14
    [ -f "$target/include/cublasLt.h" ] && return
    local include
    for include in /usr/local/cuda/include /usr/include "${CUDA_HOME:-/usr/local/cuda}/include"; do
        [ -f "$include/cublasLt.h" ] && return
    done
    echo "setup: fetching cuBLAS $version (421 MB) for its header"
    local work
    mkdir -p .deps
    work=$(mktemp -d .deps/fetch.XXXXXX)
    echo "nvidia-cublas==$version --hash=sha256:$sha256" >"$work/requirements.txt"
    python3 -m venv "$work/venv"
    "$work/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
        --platform manylinux_2_27_x86_64 -d "$work" -r "$work/requirements.txt"
    "$work/venv/bin/python" -m zipfile -e "$work"/nvidia_cublas-*.whl "$work/wheel"
    mkdir -p "$work/cublas"
    mv "$work/wheel/nvidia/cu13/include" "$work/cublas/include"
    rm -rf "$target"
    mv "$work/cublas" "$target"
    rm -rf "$work"
}

[ "$want_cuda" = no ] || cublas
[ "$want_tests" = no ] || python_env tests/python/requirements.txt
