#!/bin/sh
# Measures encrypted images side by side with QEMU's tools, and prints a table;
# some minutes.  See docs/performance.md.
#   scripts/bench-encryption.sh [--dir DIRECTORY] [--megabytes N] [--rounds N]
set -eu
cd "$(dirname "$0")/.."
exec cargo bench --quiet --bench encryption -- "$@"
