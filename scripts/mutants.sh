#!/bin/bash
# Wakes one seeded bug (src/mutants.rs) after the other and sees that the tests
# find it: the schedule and the random seed of the crash tests, or the test of
# another program, that the table in docs/crash-simulation.md names.  Fails if a
# bug survives, if the table does not list them all, or if one of these tests
# fails without any bug.  --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C RUST_BACKTRACE=0

table=docs/crash-simulation.md

usage() {
    cat << END
usage: scripts/mutants.sh [--all | --record] [MUTANT...]
  --all     runs the whole suite: once without a bug, then for each bug, random
            tests first, up to the first test that fails
  --record  looks for tests and seeds that find the bugs where those in the table
            do not, and writes the table again (QCOW2RS_CRASH_ROUNDS says how
            hard to look for seeds): after a change of the tests
The default is all the mutants of the table.  Builds in target/mutants.
END
}

mode=table
case ${1-} in
--help | -h) usage && exit ;;
--all | --record) mode=${1#--} && shift ;;
-*) usage >&2 && exit 2 ;;
esac

die() {
    printf 'mutants: %s\n' "$*" >&2
    exit 1
}

# Each mutant and what it is, separated by a tab.
described() {
    awk '
        /^    \/\/\/ / { sub(/^ *\/\/\/ /, ""); what = what (what == "" ? "" : " ") $0; next }
        /^    [A-Z][A-Za-z0-9]*,$/ && what != "" { gsub(/[ ,]/, ""); print $0 "\t" what }
        { what = "" }
    ' src/mutants.rs
}

# Each row of the table: mutant, schedule, its seed, random test, its seed.  In place
# of a schedule there may be PROGRAM/TEST, which has no seed.
rows() {
    [ -e "$table" ] || return 0
    awk -F' *[|] *' -v OFS='\t' '
        function found(cell, prefix,   parts) {
            if (split(cell, parts, /[`, ]+/) != 3) return "-" OFS "-"
            if (parts[3] == "") return parts[2] OFS "-"
            return prefix parts[2] OFS parts[3]
        }
        /^\| `[A-Z]/ { gsub(/`/, "", $2); print $2, found($4, "schedules::"), found($5, "random::") }
    ' "$table"
}

# --- running a test ----------------------------------------------------------

output=$(mktemp)
trap 'rm -f "$output"' EXIT

# What one test says of one mutant: 0 if it finds it.  Sets seed and images.
finds() { # MUTANT TEST [SEED]
    local mutant=$1 test=$2 given=${3-} status=0 limit=2h program=crash
    [ "$given" != - ] || given=''
    [ "$test" = "${test%/*}" ] || program=${test%/*}
    [ -n "${suites[$program]-}" ] || die "there is no program $program"
    # One seed is a matter of seconds.
    [ -z "$given" ] || local -x QCOW2RS_SEED=$given limit=5m
    QCOW2RS_MUTANT=$mutant timeout "$limit" "${suites[$program]}" --exact "${test#*/}" \
        > "$output" 2>&1 || status=$?
    grep -q '^running 1 test$' "$output" || die "there is no test $test"
    seed=${given:-$(sed -n 's/.*QCOW2RS_SEED=\([0-9]*\).*/\1/p' "$output" | tail -n 1)}
    images=$(sed -n 's/^crash images: //p' "$output" | tail -n 1)
    case $status in
    0) return 1 ;;
    101) return 0 ;;
    *) die "$test with the mutant '$mutant' ended with status $status: $(tail -n 5 "$output")" ;;
    esac
}

declare -A is_sound
sound() { # TEST [SEED]
    [ -z "${is_sound[$*]-}" ] || return 0
    ! finds '' "$@" || die "$1 fails without any mutant (seed ${seed:-?}): $(cat "$output")"
    is_sound[$*]=yes
}

say() { # MUTANT TEST
    printf '%-32s %s, seed %s, after %s crash images\n' "$1" "${2#*::}" "${seed:--}" "${images:-0}"
}

# The tests of a kind, but for those that run seeds of their own choice.
tests() { # PREFIX
    "${suites[crash]}" --list 2> /dev/null | sed -n "s/^\($1.*\): test$/\1/p" |
        grep -v '^random::\(a\|one\)_seed_'
}

# --- what is done --------------------------------------------------------------

# What a seed does depends on each operation of the driver, so a change anywhere may
# move where a bug shows: a few seeds more of the same family.
finds_near() { # MUTANT TEST SEED
    local near
    if [ "$3" = - ]; then
        finds "$1" "$2"
        return
    fi
    for near in 0 10 20 30 40 50 60 70 80 90; do
        sound "$2" $(($3 + near))
        ! finds "$1" "$2" $(($3 + near)) || return 0
    done
    return 1
}

# The tests that the table names.  Each has to find it, the random one with a seed near by
# at least.
by_table() { # MUTANT
    local row mutant schedule schedule_seed random random_seed killed=1
    row=$(rows | grep -P "^$1\t") || die "$1 is not in $table"
    IFS=$'\t' read -r mutant schedule schedule_seed random random_seed <<< "$row"
    if [ "$schedule" != - ]; then
        sound "$schedule" "$schedule_seed"
        if finds "$mutant" "$schedule" "$schedule_seed"; then
            say "$mutant" "$schedule"
            killed=0
        else
            echo "$mutant: $schedule with seed $schedule_seed does not find it any more" >&2
            return 1
        fi
    fi
    [ "$random" != - ] || return $killed
    if finds_near "$mutant" "$random" "$random_seed"; then
        say "$([ "$killed" = 0 ] || echo "$mutant")" "$random"
        [ "$seed" = "$random_seed" ] || stale+="$mutant: now seed $seed finds it"$'\n'
        killed=0
    else
        echo "$mutant: $random does not find it any more, nor near seed $random_seed" >&2
        return 1
    fi
    return $killed
}

by_all() { # MUTANT
    local test other
    other=$(rows | sed -n "s/^$1\t\([^\t]*\/[^\t]*\)\t.*/\1/p")
    for test in $(tests random::) $(tests schedules::) $other; do
        if finds "$1" "$test"; then
            say "$1" "$test"
            return 0
        fi
    done
    return 1
}

# A test of a kind that finds a mutant, as a cell of the table; what stands there
# already, if that still does.
cell() { # MUTANT PREFIX TEST SEED
    local mutant=$1 prefix=$2 test=$3 known=$4
    if [ "$test" = - ] ||
        ! { finds "$mutant" "$test" "$known" || finds "$mutant" "$test"; }; then
        for test in $(tests "$prefix") -; do
            if [ "$test" = - ] || finds "$mutant" "$test"; then
                break
            fi
        done
    fi
    if [ "$test" = - ]; then
        echo '-'
    else
        echo "\`${test#"$prefix"}\`${seed:+, $seed}"
    fi
}

record() { # MUTANT
    local row='' mutant schedule schedule_seed random random_seed
    row=$(rows | grep -P "^$1\t") || row=$(printf '%s\t-\t-\t-\t-' "$1")
    IFS=$'\t' read -r mutant schedule schedule_seed random random_seed <<< "$row"
    schedule=$(cell "$mutant" schedules:: "$schedule" "$schedule_seed")
    random=$(cell "$mutant" random:: "$random" "$random_seed")
    local what
    what=$(described | sed -n "s/^$mutant\t//p")
    line="| \`$mutant\` | $what | $schedule | $random |"
    echo "$line"
    # In place of its row, or behind the last.
    awk -v name="$mutant" -v line="$line" '
        { lines[NR] = $0 }
        /^\| (`|---)/ { last = NR }
        index($0, "| `" name "` |") == 1 { own = NR }
        END {
            for (n = 1; n <= NR; n++) {
                print n == own ? line : lines[n]
                if (n == last && !own) print line
            }
        }
    ' "$table" > "$table.new"
    mv "$table.new" "$table"
    [ "$schedule$random" != -- ]
}

# --- all of it -----------------------------------------------------------------

names=$(described | cut -f 1)
listed=$(sed -n 's/^| `\([A-Z][A-Za-z0-9]*\)` | *\([^|]*[^ |]\) *|.*/\1\t\2/p' "$table")
if [ $mode != record ] && ! diff <(described | sort) <(sort <<< "$listed") >&2; then
    die "src/mutants.rs (<) and $table (>) list different mutants"
fi
[ $# -gt 0 ] || set -- $names
for name in "$@"; do
    grep -qx -- "$name" <<< "$names" || die "there is no mutant $name"
done

export CARGO_TARGET_DIR=$PWD/target/mutants
export RUSTFLAGS="${RUSTFLAGS:+$RUSTFLAGS }--cfg qcow2rs_mutants"
programs=(crash failures hostile data_file resize bitmaps)
cargo test "${programs[@]/#/--test=}" --no-run
declare -A suites
for program in "${programs[@]}"; do
    suites[$program]=$(cargo test --test "$program" --no-run --message-format json 2> /dev/null |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
    [ -x "${suites[$program]}" ] || die "$program was built, but where?"
done

if [ $mode = all ]; then
    "${suites[crash]}" > "$output" 2>&1 ||
        die "the suite fails without any mutant: $(cat "$output")"
    tail -n 2 "$output"
fi
survivors='' stale=''
for name in "$@"; do
    case $mode in
    table) by_table "$name" ;;
    all) by_all "$name" ;;
    record) record "$name" ;;
    esac || survivors+=" $name"
    rm -rf "$CARGO_TARGET_DIR"/tmp/crash-*
done
[ -z "$stale" ] || printf '%s' "$table is behind the tests:"$'\n'"$stale" >&2
[ -z "$survivors" ] || die "not found:$survivors"
echo "all $# mutants are found"
