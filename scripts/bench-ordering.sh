#!/bin/bash
# Measures what the order on disk costs: this library beside a build of it that
# leaves out the sync before the pointers are written, in turns; some minutes.
# See docs/performance.md.
#   scripts/bench-ordering.sh [--dir DIRECTORY] [--rounds N]
set -euo pipefail
cd "$(dirname "$0")/.."

# The path of the program, which has a hash in its name.
build() { # TARGET-DIRECTORY RUSTFLAGS
    RUSTFLAGS=$2 cargo bench --quiet --bench ordering --no-run --target-dir "$1" \
        --message-format json |
        sed -n 's/.*"executable":"\([^"]*\/ordering-[^"]*\)".*/\1/p'
}

ordered=$(build target/ordered '')
unordered=$(build target/unordered '--cfg qcow2rs_unordered')
exec "$ordered" --unordered "$unordered" "$@"
