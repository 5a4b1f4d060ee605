#!/bin/bash
# Runs C tests with many threads under ThreadSanitizer: the library, and Rust's
# standard library in it, are compiled anew for that.  Some minutes the first time.
#   scripts/tsan.sh
# Needs a nightly Rust with its sources (rustup toolchain install nightly
# --component rust-src).  Not part of scripts/test.sh for that.
# Helgrind and DRD cannot help: they know the locks of pthread only, and those of
# Rust are futexes: they call each value behind a lock a race, and each atomic one,
# in hundreds of places that no list of suppressions would tell from a true one.
set -euo pipefail
cd "$(dirname "$0")/.."

host=$(rustc +nightly -vV | sed -n 's/^host: //p')
dir=$PWD/target/tsan
runtime=$(rustc +nightly --print sysroot)/lib/rustlib/$host/lib/librustc-nightly_rt.tsan.a
RUSTFLAGS=-Zsanitizer=thread CARGO_TARGET_DIR=$dir \
    cargo +nightly rustc --quiet --locked -Zbuild-std=std,panic_unwind --target "$host" \
    --profile dev --lib --crate-type staticlib
for test in threads storage transfers; do
    # The runtime is Rust's, of the compiler that most of the code is from.
    cc -std=c11 -D_GNU_SOURCE -g -O1 -fsanitize=thread -Iinclude -c c-tests/$test.c -o "$dir/$test.o"
    cc "$dir/$test.o" "$dir/$host/debug/libqcow2rs.a" \
        -Wl,--whole-archive "$runtime" -Wl,--no-whole-archive -Wl,--export-dynamic \
        -lpthread -ldl -lm -lrt -lgcc_s -o "$dir/$test"
    # Addresses as the sanitizer's shadow expects them.
    TSAN_OPTIONS=halt_on_error=1:exitcode=66 setarch -R "$dir/$test"
    echo "tsan: $test: ok"
done
