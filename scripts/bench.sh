#!/bin/sh
# Measures this library side by side with QEMU and a raw file, and prints tables: blocking
# calls, then queues; some minutes each.  See docs/performance.md.
#   scripts/bench.sh [blocking|queues] [--dir DIRECTORY] [--rounds N] [--filter TEXT] ...
set -eu
cd "$(dirname "$0")/.."
case ${1:-} in
blocking | queues)
    which=$1
    shift
    exec cargo bench --quiet --bench "$which" -- "$@"
    ;;
esac
# Options that both know.
cargo bench --quiet --bench blocking -- "$@"
exec cargo bench --quiet --bench queues -- "$@"
