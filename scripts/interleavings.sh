#!/bin/sh
# Runs the parts that do without locks through a model checker, which tries the
# interleavings of their threads and the values that each load may see; seconds.
# See tests/interleavings.
#   scripts/interleavings.sh [ARGUMENT OF cargo test]...
set -eu
cd "$(dirname "$0")/../tests/interleavings"
# The model checker wants to be asked for by this name.
RUSTFLAGS="${RUSTFLAGS:-} --cfg loom" CARGO_TARGET_DIR=../../target/interleavings \
    exec cargo test --quiet "$@"
