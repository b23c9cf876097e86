#!/bin/bash
# make gpu-test: build on a machine with GPUs and run everything of tests/gpu under a time limit; print one table, and
# the figures of low latency.
# tests/gpu/run.sh [build folder] [logs folder] [percent of the iterations]. Needs cmake, a C compiler and nvcc; no network.
set -u
source=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$source/build-gpu}
logs=${2:-$build/gpu-logs}
percent=${3:-30}
mkdir -p "$logs"
if [ ! -e /dev/nvidiactl ]; then
    echo "skipped: no NVIDIA driver on this machine (/dev/nvidiactl)"
    exit 77
fi
generator=""
command -v ninja >/dev/null && generator="-G Ninja"
targets="epx epx_cuda epx_command epx_bench_cuda gpu_test_differential gpu_test_stress gpu_test_graph gpu_test_fault gpu_test_bounds gpu_test_domains"
if ! { cmake -S "$source" -B "$build" $generator -DCMAKE_BUILD_TYPE=Release -DEPX_WITH_CUDA=ON &&
    cmake --build "$build" -j "$(nproc)" --target $targets $(cd "$source/tests/gpu" && ls test_ll*.c* | sed 's/^/gpu_/; s/[.].*//'); } >"$logs/build.log" 2>&1; then
    tail -40 "$logs/build.log"
    echo "the build failed: $logs/build.log"
    exit 1
fi

table=""
failed=0
# run NAME SECONDS COMMAND...
run() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1
    local rc=$? took=$((SECONDS - start)) verdict
    case $rc in
    0) verdict=passed ;;
    77) verdict=skipped ;;
    124 | 137) verdict="no end in $limit s" failed=1 ;;
    *) verdict="FAILED ($rc)" failed=1 ;;
    esac
    table+=$(printf '%-34s %-16s %4d s  %s' "$name" "$verdict" "$took" "$(tail -1 "$logs/$name.log" | cut -c1-70)")$'\n'
}

export EPX_TIMEOUT_MS=${EPX_TIMEOUT_MS:-8000}
tests=$build/tests
run fault 100 "$tests/gpu_test_fault"
run bounds 100 "$tests/gpu_test_bounds"
run graph 120 "$tests/gpu_test_graph" "${GRAPH_REPLAYS:-1000}"
run differential 300 "$tests/gpu_test_differential" "" "$percent"
run stress 120 "$tests/gpu_test_stress" "" "$((percent / 10 + 1))"
run domains 200 "$tests/gpu_test_domains"
EPX_CUDA_DOMAINS=1 EPX_TEST_PER_DOMAIN=1 EPX_NET=${EPX_GPU_NET:-ofi:tcp} run graph-domains 120 "$tests/gpu_test_graph" $((${GRAPH_REPLAYS:-1000} / 10))
for name in ll ll_slots ll_graph ll_deadline; do
    [ -x "$tests/gpu_test_$name" ] && run $name 150 "$tests/gpu_test_$name"
done
if [ -n "${EPX_GPU_SANITIZE:-}" ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck synccheck racecheck; do
        EPX_TIMEOUT_MS=60000 run "bounds-$tool" 150 compute-sanitizer --tool $tool --target-processes all --error-exitcode 9 \
            "$tests/gpu_test_bounds" 2
    done
fi
run bench_ll 500 "$source/tests/gpu/bench.sh" "$build" 20 ll
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
printf '%s' "$table"
printf '\nLow latency (docs/PERFORMANCE.md has the columns), all of it in %s\n' "$logs/bench_ll.log"
grep -E '^(==|  |# op|epx)' "$logs/bench_ll.log"
exit $failed
