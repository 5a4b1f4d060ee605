#!/bin/sh
# Measures this library side by side with qemu-img bench and a raw file, and
# prints tables; some minutes.  See docs/performance.md.
#   scripts/bench.sh [--dir DIRECTORY] [--rounds N] [--only TEXT] [--by TEXT]
set -eu
cd "$(dirname "$0")/.."
exec cargo bench --quiet --bench blocking -- "$@"
