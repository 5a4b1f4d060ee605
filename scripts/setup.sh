#!/bin/sh
# Installs what building and testing need and this machine lacks.  Can be run
# any number of times.  Packages are Debian's (or Ubuntu's); elsewhere, or
# without root, it only says what is missing.
#   scripts/setup.sh         for everything
#   scripts/setup.sh demo    for scripts/demo.sh only
set -eu
# mkfs is there, which not every user's PATH knows.
PATH=$PATH:/usr/sbin:/sbin
all=1
[ "${1:-}" != demo ] || all=''

missing=''
need() { # COMMAND PACKAGE
    command -v "$1" > /dev/null || missing="$missing $2"
}
need cc gcc
need ld binutils
need meson meson
need ninja ninja-build
need pkg-config pkg-config
need python3 python3
need qemu-img qemu-utils
need mkfs.ext4 e2fsprogs
[ -z "$all" ] || need c++ g++
[ -z "$all" ] || need valgrind valgrind
[ -z "$all" ] || need make make # fio, for scripts/fio.sh
has_libclang() { # bindgen, for the tests of the header; libclang-cpp is another one
    [ -n "${LIBCLANG_PATH:-}" ] || ldconfig -p | grep -Eq 'libclang(-[0-9.]+)?\.so' ||
        ls /usr/lib/llvm-*/lib 2> /dev/null | grep -Eq '^libclang(-[0-9.]+)?\.so'
}
[ -z "$all" ] || has_libclang || missing="$missing libclang-dev"

if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # a list of words
    set -- $missing
    echo "setup: missing: $*"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        echo "setup: please install: $* (names of Debian packages)" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; }; then
        echo "setup: cannot download; please install: $*" >&2
        exit 1
    fi
fi

minimum=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$(dirname "$0")/../Cargo.toml")
for tool in cargo rustc ${all:+rustfmt cargo-clippy}; do
    if ! command -v "$tool" > /dev/null; then
        echo "setup: please install $tool, of Rust $minimum or later: https://rustup.rs" >&2
        exit 1
    fi
done
version=$(rustc --version | cut -d' ' -f2)
if [ "$(printf '%s\n' "$minimum" "$version" | sort -V | head -n1)" != "$minimum" ]; then
    echo "setup: rustc is $version, please install $minimum or later: https://rustup.rs" >&2
    exit 1
fi
echo "setup: everything is there (rustc $version, meson $(meson --version))"
