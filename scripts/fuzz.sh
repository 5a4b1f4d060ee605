#!/bin/bash
# Fuzzes: any bytes as images, any requests to damaged ones.  Each target begins with
# its seeds (fuzz/corpus) and with what earlier runs have found (fuzz/found).
#   scripts/fuzz.sh                        each target for 5 seconds
#   scripts/fuzz.sh --minutes 30 [TARGET]  each, or one, for longer; or --seconds
#   scripts/fuzz.sh --replay TARGET FILE   one input, for instance from fuzz/artifacts
#   scripts/fuzz.sh --seeds                makes the seeds again (needs qemu-img)
# Needs a C++ compiler, and no more of Rust than the library does: the flags below
# are those of cargo-fuzz, which works in fuzz/ as well.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=5 replay='' seeds='' targets=()
while [ $# -gt 0 ]; do
    case $1 in
    --minutes) seconds=$((${2?} * 60)) && shift 2 ;;
    --seconds) seconds=${2?} && shift 2 ;;
    --replay) targets=("${2?}") replay=${3?} && shift 3 ;;
    --seeds) seeds=1 && shift ;;
    -*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
    *) targets+=("$1") && shift ;;
    esac
done
[ ${#targets[@]} -gt 0 ] || targets=(open operations check parsers snapshots luks)

# Of the host: with a target given, its build scripts are compiled without the flags.
host=$(rustc -vV | sed -n 's/^host: //p')
flags=(
    --cfg=fuzzing
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
    -Ccodegen-units=1
)
export CARGO_TARGET_DIR=$PWD/target/fuzz
build() { # BINARY...
    RUSTFLAGS="${flags[*]}" cargo build --quiet --release --locked --target "$host" \
        --manifest-path fuzz/Cargo.toml "${@/#/--bin=}"
}

if [ -n "$seeds" ]; then
    cargo run --quiet --locked --manifest-path fuzz/Cargo.toml --example seeds
    exit
fi
build "${targets[@]}"
for target in "${targets[@]}"; do
    binary=$CARGO_TARGET_DIR/$host/release/$target
    if [ -n "$replay" ]; then
        exec "$binary" "$replay"
    fi
    mkdir -p "fuzz/found/$target" "fuzz/artifacts/$target"
    log=$CARGO_TARGET_DIR/$target.log
    if ! "$binary" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=1024 \
        -print_final_stats=1 -artifact_prefix="fuzz/artifacts/$target/" \
        "fuzz/found/$target" "fuzz/corpus/$target" > "$log" 2>&1; then
        tail -n 40 "$log" >&2
        echo "fuzz: $target has failed; replay: scripts/fuzz.sh --replay $target FILE" >&2
        exit 1
    fi
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    echo "fuzz: $target: $runs inputs, $coverage places reached"
    [ "$runs" -gt 100 ]
done
