#!/bin/sh
# Measures encrypted images side by side with qemu-img bench, and prints a table;
# a minute or two.
#   scripts/bench-encryption.sh [--dir DIRECTORY] [--megabytes N] [--rounds N]
set -eu
cd "$(dirname "$0")/.."
exec cargo bench --quiet --bench encryption -- "$@"
