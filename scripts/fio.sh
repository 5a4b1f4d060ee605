#!/bin/bash
# Builds fio's engine of examples/fio-qcow2rs.c and runs jobs with it: they verify
# what they wrote, and so does fio after QEMU has read it.
#   [FIO_SRC=TREE] scripts/fio.sh [DIRECTORY_OF_LIBQCOW2RS.SO]
# FIO_SRC is a tree of fio's source in which fio was built (./configure && make). If it
# is not set, Debian's source package is fetched and built below target/fio, once.
# Without a directory, the library is built (release).  Exits with 77 where there is no
# tree and none to be had.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

skip() {
    printf 'fio: SKIPPED: %s; set FIO_SRC to a tree in which fio was built\n' "$1" >&2
    exit 77
}

# The source package, through lists of our own: those of the system stay as they are.
fetch() {
    command -v apt-get > /dev/null || skip 'no apt-get to fetch the source with'
    local codename work=$root/target/fio
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [ "$(. /etc/os-release && echo "$ID")" = debian ] || skip 'this is not Debian'
    rm -rf "$work"
    mkdir -p "$work/lists/partial"
    cd "$work"
    echo "deb-src http://deb.debian.org/debian $codename main" > sources.list
    local apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/sources.list"
        -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$work/lists"
        -o "Dir::Cache=$work" -o APT::Sandbox::User=root)
    { "${apt[@]}" update && "${apt[@]}" source --download-only fio; } ||
        skip 'the source package cannot be downloaded'
    mkdir tree
    tar xf fio_*.orig.tar.?z -C tree --strip-components 1
    cd tree
    { ./configure --disable-native && make -j"$(nproc)" fio; } > build.log 2>&1 || {
        tail -n 20 build.log >&2
        exit 1
    }
    cd "$root"
}

if [ -z "${FIO_SRC:-}" ]; then
    FIO_SRC=$root/target/fio/tree
    [ -x "$FIO_SRC/fio" ] || fetch
fi
[ -x "$FIO_SRC/fio" ] && [ -e "$FIO_SRC/config-host.h" ] || {
    echo "fio: $FIO_SRC: run ./configure and make there first" >&2
    exit 1
}
libraries=${1:-}
if [ -z "$libraries" ]; then
    cargo build --release --quiet
    libraries=${CARGO_TARGET_DIR:-target}/release
fi
libraries=$(realpath "$libraries")

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
ln -s "$libraries/libqcow2rs.so" .
soname=$(readelf -d "$libraries/libqcow2rs.so" | sed -n 's/.*SONAME.*\[\(.*\)\]/\1/p')
ln -s "$libraries/libqcow2rs.so" "$soname"
cc -shared -fPIC -O2 -std=gnu11 -Wall -Werror -D_GNU_SOURCE -I "$FIO_SRC" \
    -include "$FIO_SRC/config-host.h" -I "$root/include" -o fio-qcow2rs.so \
    "$root/examples/fio-qcow2rs.c" -L. -lqcow2rs -Wl,-rpath,"$scratch"

# Runs a job; everything of it is to be without errors.
job() { # NAME OPTION...
    local name=$1
    shift
    "$FIO_SRC/fio" --name="$name" --output="$name.txt" "$@" || {
        cat "$name.txt" >&2
        exit 1
    }
    grep -q 'err= 0' "$name.txt" || {
        cat "$name.txt" >&2
        exit 1
    }
    grep -E '^ +(read|write|trim): ' "$name.txt" | sed "s/^ */fio: $name: /"
}
ours=(--ioengine=external:"$scratch/fio-qcow2rs.so" --filename=overlay.qcow2)
blocks=(--rw=randwrite --bs=4k --size=32M --iodepth=32 --verify=crc32c --randseed=7)

head -c 64M /dev/urandom > base.raw
qemu-img create -q -f qcow2 -F raw -b base.raw -o cluster_size=128k,extended_l2=on overlay.qcow2
# Written and verified, syncs in between; verified once more by a new process.
job write "${ours[@]}" "${blocks[@]}" --fsync=64 --verify_fatal=1
job again "${ours[@]}" "${blocks[@]}" --verify_only --verify_fatal=1
qemu-img check -q overlay.qcow2
# What QEMU reads passes as well.
qemu-img convert -f qcow2 -O raw overlay.qcow2 copy.raw
job qemu --ioengine=psync --filename=copy.raw "${blocks[@]}" --verify_only --verify_fatal=1
cmp -i 32M base.raw copy.raw
# Two threads on one image, past the page cache; then by the other engine of queues.
job threads "${ours[@]}" --thread --numjobs=2 --rw=randrw --bs=4k --size=16M \
    --offset=32M --offset_increment=16M --iodepth=16 --direct=1 --verify=crc32c \
    --verify_fatal=1
job blocking "${ours[@]}" --queue_engine=blocking --rw=randwrite --bs=64k --size=8M --iodepth=4 \
    --verify=crc32c --verify_fatal=1
job trim "${ours[@]}" --rw=trim --bs=128k --size=16M --iodepth=8
qemu-img check -q overlay.qcow2
# fio is to notice what is wrong: somebody else's bytes in place of what it wrote.
qemu-io -f qcow2 -c 'write -q -P 7 0 32M' overlay.qcow2
if "$FIO_SRC/fio" --name=wrong --output=wrong.txt "${ours[@]}" "${blocks[@]}" --verify_only \
    --verify_fatal=1 2> /dev/null; then
    echo 'fio: the jobs notice nothing' >&2
    exit 1
fi
echo 'fio: all jobs passed'
