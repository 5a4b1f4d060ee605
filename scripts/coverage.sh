#!/bin/bash
# Which lines of the core the crash simulation runs.
#   scripts/coverage.sh [NAME OF TESTS...]
# Without names, all tests of tests/crash.  Prints a table of src/alloc, src/image,
# src/metadata and src/io (without the simulator itself), and leaves a listing of
# each line at target/coverage/lines.txt.  Needs the LLVM tools of this very compiler:
# those of a distribution are mostly too old to read what it writes.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=$(rustc --print target-libdir)/../bin
if [ ! -x "$tools/llvm-cov" ]; then
    echo "$0: rustup component add llvm-tools" >&2
    exit 1
fi

# Debug builds of their own: instrumented objects and others are apart.
dir=$PWD/target/coverage
mkdir -p "$dir"
rm -f "$dir"/*.profraw
export RUSTFLAGS='-C instrument-coverage'
export LLVM_PROFILE_FILE=$dir/build-%p.profraw
binary=$(cargo test --target-dir "$dir" --test crash --no-run --message-format=json |
    sed -n 's/.*"name":"crash".*"executable":"\([^"]*\)".*/\1/p' | tail -1)
rm -f "$dir"/*.profraw

LLVM_PROFILE_FILE=$dir/crash-%p-%m.profraw "$binary" --quiet "$@"
"$tools/llvm-profdata" merge -sparse "$dir"/crash-*.profraw -o "$dir/crash.profdata"

sources=(src/alloc src/image src/metadata src/io)
ignored='src/io/(sim|tests)/|_tests\.rs$'
cov() { # COMMAND OPTION...
    "$tools/llvm-cov" "$1" "$binary" -instr-profile="$dir/crash.profdata" \
        -ignore-filename-regex="$ignored" "${@:2}" "${sources[@]}"
}
cov show > "$dir/lines.txt"
# Lines, missed lines and their share; the other columns are in the way.
cov report -show-region-summary=false -show-branch-summary=false -use-color=false
