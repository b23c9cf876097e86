#!/bin/sh
# Runs `epx bench` and the MPI peer in turn on the same routing and the same rows, and prints how their times compare.
#
#     bench/peers/run.sh [shared|tcp]      (default: shared memory; tcp: both over loopback TCP, ours as two domains)
#
# Settings, from the environment: BUILD (build), RANKS (2), TOKENS (4096), HIDDEN (7168), TOPK (8), EXPERTS (256), ITERS (20),
# WARMUP (5), TURNS (5), ROUTING (uniform, or zipf). Ends with one line each, their time over ours, medians over the turns:
#     ratio dispatch X.XX    pack + MPI_Alltoallv, against epx_dispatch_again into a lease (both know the routing already)
#     ratio combine X.XX     MPI_Alltoallv + sum, against epx_combine with x in a lease
set -eu
cd "$(dirname "$0")/../.."
WHERE=${1:-shared} BUILD=${BUILD:-build} RANKS=${RANKS:-2} TOKENS=${TOKENS:-4096} HIDDEN=${HIDDEN:-7168}
TOPK=${TOPK:-8} EXPERTS=${EXPERTS:-256} ITERS=${ITERS:-20} WARMUP=${WARMUP:-5} TURNS=${TURNS:-5} ROUTING=${ROUTING:-uniform}
EPX=$BUILD/bin/epx PEER=$BUILD/bin/mpi_alltoallv

case $WHERE in
shared) SUFFIX="" OURS="" THEIRS="" ;;
tcp) SUFFIX=-tcp OURS="--domains $RANKS --net ofi:tcp" THEIRS="--mca btl tcp,self --mca pml ob1" ;;
*) echo "bench/peers/run.sh: \"$WHERE\": shared or tcp is needed" >&2 && exit 2 ;;
esac
[ -x "$EPX" ] || { echo "bench/peers/run.sh: $EPX is not there: run make first, or name the build folder in BUILD" >&2; exit 1; }
command -v mpicc >/dev/null || { echo "bench/peers/run.sh: mpicc is not there: tools/setup.sh bench installs it" >&2; exit 1; }

mpicc -O3 -march=native -std=gnu11 -ffp-contract=off -Wall -Wextra -Itools/epx bench/peers/mpi_alltoallv.c -o "$PEER"
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT INT TERM
ROOT="" && [ "$(id -u)" != 0 ] || ROOT=--allow-run-as-root

# "NAME US" lines of one run of ours: from the JSON, which has an object a line.
ours() {
    $EPX bench --op dispatch,dispatch_cached,combine --backend cpu --ranks "$RANKS" --tokens "$TOKENS" --hidden "$HIDDEN" \
        --topk "$TOPK" --experts "$EXPERTS" --routing "$ROUTING" --iters "$ITERS" --warmup "$WARMUP" --no-floor \
        --json "$OUT/ours.json" $OURS >"$OUT/ours.txt" 2>"$OUT/ours.err" || { cat "$OUT/ours.txt" "$OUT/ours.err" >&2; exit 1; }
    sed -n 's/.*"op": "\([a-z_]*\)".*"time_us_median": \([0-9.]*\).*/\1 \2/p' "$OUT/ours.json"
}

theirs() {
    mpirun $ROOT --oversubscribe $THEIRS -np "$RANKS" "$PEER" "$TOKENS" "$HIDDEN" "$TOPK" "$EXPERTS" "$ITERS" "$WARMUP" 1 \
        "$ROUTING" >"$OUT/theirs.txt" 2>"$OUT/theirs.err" || { cat "$OUT/theirs.txt" "$OUT/theirs.err" >&2; exit 1; }
    grep -v '^wrong' "$OUT/theirs.txt"
}

# median WHO NAME: of all turns.
median() {
    sed -n "s/^$1 $2 //p" "$OUT/all" | sort -n |
        awk '{v[NR] = $1} END {print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2}'
}

echo "# $RANKS ranks, $TOKENS tokens a rank, hidden $HIDDEN bf16, top-$TOPK of $EXPERTS, $ROUTING, $WHERE; $TURNS turns of $ITERS iterations"
echo "# $(mpirun --version | head -n 1); both verify every row before they time; us, median of the slowest rank"
: >"$OUT/all"
turn=1
while [ "$turn" -le "$TURNS" ]; do
    ours >"$OUT/turn" && sed 's/^/ours /' "$OUT/turn" >>"$OUT/all"
    echo "turn $turn ours:   $(tr '\n' ' ' <"$OUT/turn")"
    theirs >"$OUT/turn" && sed 's/^/theirs /' "$OUT/turn" >>"$OUT/all"
    echo "turn $turn theirs: $(tr '\n' ' ' <"$OUT/turn")"
    turn=$((turn + 1))
done
ratio() {
    awk -v what="$1$SUFFIX" -v theirs="$(median theirs "$2")" -v ours="$(median ours "$3")" \
        'BEGIN {printf "ratio %s %.2f\n", what, theirs / ours}'
}
# The routing counted anew each time, on both sides: for orientation.
echo "# with the counts each time: $(ratio dispatch dispatch_with_counts dispatch)"
ratio dispatch dispatch dispatch_cached
ratio combine combine combine
