#!/bin/bash
# Tests everything: format, lints, Rust tests, and the C library as meson
# builds, links, installs and embeds it.  Run from anywhere; ends with the first
# step that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
# No test may do without QEMU's tools.
export QCOW2RS_NEED_QEMU=1

# cargo's own output and meson's are apart; all builds of meson share theirs.
cargo_dir=$root/target/meson
scratch=$(mktemp -d)
title='' start=0

finish() {
    local status=$?
    rm -rf "$scratch"
    if [ $status != 0 ]; then
        printf '==> %s: FAILED, %d s\n' "$title" $((SECONDS - start)) >&2
    fi
}
trap finish EXIT

step() { # TITLE COMMAND...
    title=$1 start=$SECONDS
    shift
    printf '\n==> %s\n' "$title"
    # Not in a condition, where the shell would not stop at an error.
    ("$@")
    printf '==> %s: ok, %d s\n' "$title" $((SECONDS - start))
}

configure() { # DIRECTORY OPTION...
    local directory=$1
    shift
    if [ -e "$directory/build.ninja" ]; then
        set -- --reconfigure "$@"
    fi
    meson setup "$directory" "-Dcargo_target_dir=$cargo_dir" "$@"
}

meson_build() { # DIRECTORY OPTION...
    configure "$@"
    ninja -C "$1"
}

meson_test() { # DIRECTORY OPTION...
    meson_build "$@"
    meson test -C "$1" --print-errorlogs
}

no_op_build() {
    local said
    said=$(ninja -C build)
    echo "$said"
    [[ $said == *'no work to do.'* ]]
}

check_format() {
    cargo fmt --all --check
    cargo fmt --manifest-path tests/interleavings/Cargo.toml --check
    cargo fmt --manifest-path fuzz/Cargo.toml --check
}

# A program of somebody else's, with nothing but pkg-config.
use_installed() {
    local prefix=$scratch/prefix flags
    configure target/meson-both --prefix "$prefix" --libdir lib -Ddefault_library=both
    ninja -C target/meson-both
    meson install -C target/meson-both --no-rebuild --quiet
    (cd "$prefix" && find . ! -type d | sort)
    export PKG_CONFIG_PATH=$prefix/lib/pkgconfig

    read -ra flags <<< "$(pkg-config --cflags --libs qcow2rs)"
    cc -std=c11 -Wall -Wextra -Werror c-tests/smoke.c "${flags[@]}" -o "$scratch/shared"
    readelf -d "$scratch/shared" | grep 'NEEDED.*libqcow2rs'
    LD_LIBRARY_PATH=$prefix/lib "$scratch/shared"

    read -ra flags <<< "$(pkg-config --static --cflags --libs qcow2rs)"
    cc -std=c11 -Wall -Wextra -Werror -static c-tests/smoke.c "${flags[@]}" -o "$scratch/static"
    "$scratch/static"
}

# A meson project that has this one below subprojects/.
use_as_subproject() { # shared|static
    local super=$scratch/super-$1
    cp -r c-tests/superproject "$super"
    mkdir "$super/subprojects"
    ln -s "$root" "$super/subprojects/qcow2rs"
    meson setup "$super/build" "$super" "-Ddefault_library=$1" \
        "-Dqcow2rs:cargo_target_dir=$cargo_dir"
    ninja -C "$super/build"
    meson test -C "$super/build" --print-errorlogs
    DESTDIR=$scratch/dest-$1 meson install -C "$super/build" --skip-subprojects --quiet
    # The static program does not ask for the shared library.
    local needed
    needed=$(readelf -d "$super/build/program" | grep -c 'NEEDED.*libqcow2rs') || true
    [ "$1/$needed" = shared/1 ] || [ "$1/$needed" = static/0 ]
}

# Needs fio's source: is told loudly, and does not fail, where that is not to be had.
fio_jobs() {
    local status=0
    scripts/fio.sh "${CARGO_TARGET_DIR:-target}/debug/deps" || status=$?
    [ $status = 0 ] || [ $status = 77 ]
}

step 'setup' scripts/setup.sh
step 'format' check_format
step 'lints' cargo clippy --workspace --all-targets --all-features -- -D warnings
step 'documentation' env RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --all-features
step 'Rust tests' cargo test --workspace --all-features
step 'interleavings' scripts/interleavings.sh
step 'mutants' scripts/mutants.sh
step 'fuzzing, briefly' scripts/fuzz.sh --seconds 4
step 'fio' fio_jobs
step 'C tests' meson_test build
step 'nothing to rebuild' no_op_build
step 'C tests under valgrind' meson test -C build --setup valgrind --suite api --print-errorlogs
step 'C tests with AddressSanitizer' meson_test target/meson-asan -Db_sanitize=address,undefined
step 'C tests without prelink' meson_test target/meson-plain -Dprelink=false
step 'installed' use_installed
step 'demo' scripts/demo.sh --size 0.125
step 'subproject, shared' use_as_subproject shared
step 'subproject, static' use_as_subproject static
printf '\n==> all of it: ok, %d s\n' "$SECONDS"
