#!/bin/sh
# Measures compressed images side by side with qemu-img convert, and prints a
# table; some minutes.  See docs/compression.md.
#   scripts/bench-compression.sh [--dir DIRECTORY] [--megabytes N] [--rounds N]
set -eu
cd "$(dirname "$0")/.."
exec cargo bench --quiet --bench compression -- "$@"
