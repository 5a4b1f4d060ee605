#!/bin/bash
# Shows what extended L2 entries are good for: makes a disk full of real files,
# puts overlays with and without them on it, lets a C program write the same 4 KiB
# blocks to each, and prints side by side what that cost.  QEMU checks the images
# and compares them.  --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin # mkfs.ext4, for those who are not root

usage() {
    cat << END
usage: scripts/demo.sh [--size GIB] [--writes N] [--seed N]
  --size    of the base disk, in GiB (default: 0.5)
  --writes  of 4 KiB, at random places, none twice
            (default: two for each 128 KiB of the disk, at most 16384)
  --seed    where they are (default: 1)
Installs what is missing (scripts/setup.sh), builds, and works in target/demo,
which needs room for four times the size.
END
}

gib=0.5 writes='' seed=1
while [ $# -gt 0 ]; do
    case $1 in
    --help | -h) usage && exit ;;
    --size) gib=${2-} ;;
    --writes) writes=${2-} ;;
    --seed) seed=${2-} ;;
    *) usage >&2 && exit 2 ;;
    esac
    shift $(($# < 2 ? $# : 2))
done
number='^[1-9][0-9]*$'
mib=$(awk -v gib="$gib" 'BEGIN { if (gib ~ /^[0-9.]+$/) printf "%d", gib * 1024 }')
if ! [[ $mib =~ $number && $mib -ge 32 && $seed =~ $number && ${writes:-1} =~ $number ]]; then
    echo 'demo: --size is a number from 0.03125 on, --writes and --seed are whole ones from 1 on' >&2
    exit 2
fi
writes=${writes:-$((mib * 16 < 16384 ? mib * 16 : 16384))}

dir=target/demo
base=$dir/base-${mib}M.raw
expected=$dir/expected.raw
names=(extended standard default)
step='' log='' files=''

finish() {
    local status=$?
    if [ $status != 0 ]; then
        [ -z "$log" ] || tail -n 20 "$log" >&2
        echo "demo: failed: $step${files:+; see $files}" >&2
    fi
}
trap finish EXIT

step() {
    step=$1
    printf '\n==> %s\n' "$step"
}

thousands() { # NUMBER
    sed -E ':a; s/^([0-9]+)([0-9]{3})/\1,\2/; ta' <<< "$1"
}

size() { # BYTES
    awk -v n="$1" 'BEGIN {
        split("bytes KiB MiB GiB TiB", unit)
        for (i = 1; n >= 1024 && i < 5; i++) n /= 1024
        printf i == 1 ? "%d %s" : "%.1f %s", n, unit[i]
    }'
}

quietly() { # COMMAND... : what it prints is shown if it fails
    log=$dir/log
    "$@" > $log 2>&1
    log=''
}

# --------------------------------------------------------------------- library
build() {
    [ -e $dir/build/build.ninja ] ||
        quietly meson setup $dir/build --prefix "$PWD/$dir/prefix" --libdir lib \
            -Dtests=false -Dexamples=false "-Dcargo_target_dir=$PWD/target/meson"
    quietly ninja -C $dir/build
    quietly meson install -C $dir/build --no-rebuild
    export PKG_CONFIG_PATH=$PWD/$dir/prefix/lib/pkgconfig
    export LD_LIBRARY_PATH=$PWD/$dir/prefix/lib
    local flags
    read -ra flags <<< "$(pkg-config --cflags --libs qcow2rs)"
    cc -O2 examples/overlay.c "${flags[@]}" -o $dir/overlay
    # shellcheck disable=SC2016 # shown as it is
    echo '    cc -O2 examples/overlay.c $(pkg-config --cflags --libs qcow2rs)'
}

# ------------------------------------------------------------------------ base
# Copies as many files of this machine as take `room` blocks of 4 KiB, one more
# directory of copies after the other.
copy_files() { # DIRECTORY BLOCKS
    local to=$1 room=$(($2 * 16)) round before bytes cost path
    for ((round = 1, before = 0; room > 16 && room != before; round++)); do
        before=$room
        mkdir -p "$to/$round"
        while IFS=' ' read -r -d '' bytes path; do
            # In sixteenths of a block: the file, its inode, a share of directories.
            cost=$(((bytes + 4095) / 4096 * 16 + 4))
            ((cost <= room)) || continue
            room=$((room - cost))
            printf '%s\0' "${path#/}"
        done < $dir/files > $dir/chosen
        tar -C / --null -T $dir/chosen -cf - | tar -C "$to/$round" --no-same-owner -xf -
    done
}

make_base() {
    local stage=$dir/stage
    rm -rf $stage $base.partial
    mkdir -p $stage
    find "$(rustc --print sysroot)" /usr/share /usr/lib -xdev -type f -size +0 -readable \
        -printf '%s %p\0' > $dir/files
    copy_files $stage $((mib * 256 * 99 / 100 - 64))
    # No journal, nothing reserved, few free inodes: all room is for the files.
    quietly mkfs.ext4 -d $stage -b 4096 -m 0 -N $(($(find $stage | wc -l) + mib / 8 + 64)) \
        -O ^has_journal,^resize_inode $base.partial "${mib}M"
    rm -rf $stage $dir/files $dir/chosen
    mv $base.partial $base
}

describe_base() {
    dumpe2fs -h $base 2> /dev/null | awk -v name=$base -F': *' '
        { of[$1] = $2 }
        END {
            printf "    %s: %d files, %.1f %% of its blocks in use\n", name,
                of["Inode count"] - of["Free inodes"] - 11,
                100 * (1 - of["Free blocks"] / of["Block count"])
        }'
}

# -------------------------------------------------------------------- overlays
declare -A result

overlay() { # NAME OPTION...
    local name=$1 key value
    shift
    # The second run counts: by then the system has the memory for its page cache
    # at hand, the base is in there, and nothing is left to be written.
    for _ in warm-up run; do
        sync -f $dir
        $dir/overlay -n "$writes" -s "$seed" "$@" $base "$dir/$name.qcow2" > "$dir/$name.txt"
    done
    while read -r key value; do
        result[$name.$key]=$value
    done < "$dir/$name.txt"
}

row() { # TITLE CELL CELL CELL
    printf '    %-24s %16s %16s %16s\n' "$@"
}

rows() { # TITLE KEY FORMAT
    local name cells=()
    for name in "${names[@]}"; do
        cells+=("$("$3" "${result[$name.$2]}")")
    done
    row "$1" "${cells[@]}"
}

rows_per_guest_byte() { # TITLE KEY
    local name cells=()
    for name in "${names[@]}"; do
        cells+=("$(awk -v n="${result[$name.$2]}" -v guest="${result[$name.guest_bytes_written]}" \
            'BEGIN { printf "%.2f", n / guest }')")
    done
    row "$1" "${cells[@]}"
}

table() {
    row '' 'extended L2' 'standard L2' 'standard L2'
    row '' '128 KiB' '128 KiB' '64 KiB (default)'
    rows 'writes per second' writes_per_second thousands
    rows '  with the flush' writes_per_second_flushed thousands
    rows 'copied from the base' bytes_copied size
    rows_per_guest_byte 'written per guest byte' file_bytes_written
    rows 'file, apparent size' apparent_size size
    rows 'file, size on disk' real_size size
    rows 'memory for metadata' metadata_bytes size
    rows 'verified by reading' bytes_verified size
}

# ------------------------------------------------------------------------ QEMU
qemu_agrees() {
    local name
    for name in "${names[@]}"; do
        quietly qemu-img check -f qcow2 "$dir/$name.qcow2"
        quietly qemu-img compare -f raw -F qcow2 $expected "$dir/$name.qcow2"
    done
    quietly qemu-img compare -f qcow2 -F qcow2 $dir/extended.qcow2 $dir/standard.qcow2
    echo '    qemu-img check:    no errors and no leaks in any'
    echo '    qemu-img compare:  identical to each other, and to a raw copy of the base'
    echo '                       that got the same writes'
}

step 'What is needed'
scripts/setup.sh demo | sed 's/^setup:/   /'
mkdir -p $dir
files=$dir
step "Build the library, install it in $dir/prefix, compile a C program"
build
step "A base disk: ext4, $mib MiB, filled with files of this machine"
[ -e $base ] || make_base
describe_base
step "$(thousands "$writes") random 4 KiB writes to overlays on it, by cluster size"
overlay extended -e -c 128k
overlay standard -c 128k
overlay default -c 64k -x $expected
table
step 'What QEMU says'
qemu_agrees
rm -f $expected $dir/{extended,standard,default}.{qcow2,txt} $dir/log
printf '\n    kept for next time: %s (%s), %s/build\n' $base "$(size $((mib << 20)))" $dir
