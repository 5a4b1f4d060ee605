#!/bin/bash
# Simulates power losses, process deaths and failing disks, for as long as you like.
#   scripts/crash.sh [--minutes N] [--seed FIRST] [--medium NAME] [--parity]
# Media: seeded (512- or 4096-byte units, the default), sectors, pages; words and
# garbage are hostile, and what they break is only counted.  --parity judges by what
# QEMU promises rather than by what this driver does.  Ends with a table, and fails
# with the command that repeats a failure.  docs/crash-simulation.md explains it all.
set -euo pipefail
cd "$(dirname "$0")/.."

export QCOW2RS_CRASH_MINUTES=1
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) QCOW2RS_CRASH_MINUTES=$2; shift 2 ;;
        --seed) export QCOW2RS_SEED=$2; shift 2 ;;
        --medium) export QCOW2RS_CRASH_MEDIUM=$2; shift 2 ;;
        --parity) export QCOW2RS_ORACLE=parity; shift ;;
        *) sed -n '2,3s/^# //p' "$0" >&2; exit 2 ;;
    esac
done

# Images are large blocks of memory, of which the C library would give each back to
# the system at once.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
export MALLOC_TOP_PAD_=67108864
exec cargo test --release --quiet --test crash crash_images_of_all_families -- --nocapture
