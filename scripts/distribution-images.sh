#!/bin/bash
# Packs a file system with files of this machine in all the ways in which distributions
# ship images, and has each go there and back between QEMU and this library:
#
#     scripts/distribution-images.sh [MIB] [DIRECTORY]
#
# MIB: how large the file system is (default: 1024), filled with what fits of DIRECTORY
# (default: /usr). Needs qemu-utils and e2fsprogs, and about eight times that much room
# in TMPDIR. Some minutes. (With some MiB it is part of `cargo test`.)
set -euo pipefail
cd "$(dirname "$0")/.."
mib=${1:-1024} from=${2:-/usr}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Hard links where that is possible: nothing is copied but into the file system.
mkdir "$scratch/files"
left=$((mib * 5 / 8 * 1024))
while IFS=$'\t' read -r kib path; do
    ((kib <= left)) || continue
    mkdir -p "$scratch/files/$(dirname "$path")"
    cp -l "$from/$path" "$scratch/files/$path" 2>/dev/null ||
        cp "$from/$path" "$scratch/files/$path" 2>/dev/null || continue
    left=$((left - kib - 4))
done < <(cd "$from" && find . -xdev -type f -printf '%k\t%P\n' | sort -k2)
/usr/sbin/mke2fs -q -F -t ext4 -d "$scratch/files" "$scratch/content" "${mib}M"
rm -rf "$scratch/files"
QCOW2RS_DISTRIBUTION="$scratch/content" \
    cargo test --release --test distribution_images -- --nocapture
