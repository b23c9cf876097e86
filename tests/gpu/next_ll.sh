#!/bin/bash
# Low latency on GPUs, both ways that rows arrive: is it right, and how long does it take. Under four minutes, one table.
# tests/gpu/next_ll.sh [build folder] [logs folder]. Needs cmake, a C++ compiler and nvcc; no network. Run it with two GPUs
# or more; ranks of the timing: GPUs of the machine, at most 4.
set -u
source=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$source/build-ll}
logs=${2:-$build/ll-logs}
mkdir -p "$logs"
if [ ! -e /dev/nvidiactl ]; then
    echo "skipped: no NVIDIA driver on this machine (/dev/nvidiactl)"
    exit 77
fi
gpus=$(nvidia-smi -L | wc -l)
ranks=$((gpus < 4 ? gpus : 4))
generator=""
command -v ninja >/dev/null && generator="-G Ninja"
targets="epx epx_cuda gpu_test_ll gpu_test_ll_slots gpu_test_ll_graph gpu_test_ll_deadline"
if ! { cmake -S "$source" -B "$build" $generator -DCMAKE_BUILD_TYPE=Release -DEPX_WITH_CUDA=ON -DEPX_WITH_OFI=OFF \
    -DEPX_WITH_PYTHON=OFF -DEPX_BUILD_EXAMPLES=OFF -DEPX_CUDA_ARCHITECTURES=90-real &&
    timeout 100 cmake --build "$build" -j "$(nproc)" --target $targets; } >"$logs/build.log" 2>&1; then
    tail -40 "$logs/build.log"
    echo "the build failed: $logs/build.log"
    exit 1
fi
echo "built after $SECONDS s"

failed=0
# run NAME SECONDS COMMAND...
run() {
    local name=$1 limit=$2 start=$SECONDS verdict
    shift 2
    timeout -k 3 "$limit" "$@" >"$logs/$name.log" 2>&1
    case $? in
    0) verdict=passed ;;
    124 | 137) verdict="no end in $limit s" failed=1 ;;
    *) verdict=FAILED failed=1 ;;
    esac
    printf '%-24s %-18s %3d s  %s\n' "$name" "$verdict" $((SECONDS - start)) "$(tail -1 "$logs/$name.log" | cut -c1-80)"
    [ "$verdict" = passed ] || grep -v ' 0 wrong ' "$logs/$name.log" | head -12
}

export EPX_TIMEOUT_MS=5000
tests=$build/tests
# In-band first: it is what nobody has seen run.
EPX_LL_INBAND=1 run inband-first 15 "$tests/gpu_test_ll" "two ranks" 30
EPX_LL_INBAND=1 run inband-time 15 "$tests/gpu_test_ll_graph" 0 "$ranks"
EPX_LL_INBAND=0 run flags-time 15 "$tests/gpu_test_ll_graph" 0 "$ranks"
EPX_LL_INBAND=1 run inband-differential 30 "$tests/gpu_test_ll" "" 60
EPX_LL_INBAND=1 run inband-slots 30 "$tests/gpu_test_ll_slots" "" 60
EPX_LL_INBAND=1 run inband-graphs 25 "$tests/gpu_test_ll_graph" 200
EPX_LL_INBAND=0 run flags-slots 20 "$tests/gpu_test_ll_slots" "" 30
EPX_LL_INBAND=0 run flags-differential 20 "$tests/gpu_test_ll" "" 20
run deadline 15 "$tests/gpu_test_ll_deadline"
EPX_LL_INBAND=1 EPX_SMS=96 run inband-time-96-blocks 15 "$tests/gpu_test_ll_graph" 0 "$ranks"

# The slowest rank of each shape; goals of 2 and 4 GPUs (issue 5).
times() {
    sed -n 's/^rank [0-9]* of [0-9]*: \(.*[a-z0-9]\)  *\([0-9.]*\) us.*/\1|\2/p' "$logs/$1.log" | sed 's/ *|/|/' |
        awk -F'|' '{ if ($2 > most[$1]) most[$1] = $2; if (!($1 in at)) { at[$1] = ++n; name[n] = $1 } }
                   END { for (i = 1; i <= n; i++) printf "%s|%s\n", name[i], most[name[i]] }'
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c
echo "microseconds, slowest of $ranks ranks, 24 calls in a replayed graph:"
{
    times flags-time | sed 's/^/f|/'
    times inband-time | sed 's/^/i|/'
    times inband-time-96-blocks | sed 's/^/s|/'
} | awk -F'|' -v ranks="$ranks" '
    BEGIN {
        split(ranks == 2 ? "12 15 0 40 25 0" : "17 23 0 56 38 0", goals, " ")
        printf "%-26s %8s %8s %14s %6s\n", "", "flags", "in-band", "on 96 blocks", "goal"
    }
    { if (!($2 in at)) { at[$2] = ++n; name[n] = $2 }; value[$1, $2] = $3 }
    END {
        for (i = 1; i <= n; i++) {
            s = name[i]
            printf "%-26s %8s %8s %14s %6s\n", s, value["f", s], value["i", s], value["s", s], goals[i] ? goals[i] : ""
        }
        printf "%-26s %8.2f %8.2f %14.2f %6s\n", "combine (pair - dispatch)", value["f", "fp8 pair, combine"] - value["f", "fp8 dispatch"],
            value["i", "fp8 pair, combine"] - value["i", "fp8 dispatch"], value["s", "fp8 pair, combine"] - value["s", "fp8 dispatch"],
            ranks == 2 ? 29 : 41
    }'
echo "all of it took $SECONDS s"
exit $failed
