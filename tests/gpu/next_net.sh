#!/bin/bash
# Domains of GPUs, which have not been run on a GPU yet: everything about them in one call of less than 4 minutes.
#
#   next_net.sh carry BUILD    on a machine with libfabric: its libraries and our plug-in into build-carry/, for one without
#   next_net.sh [percent]      on a machine with a GPU: build what is needed (for this GPU alone), run it, print one table
#
# One GPU is enough: ranks share it. Logs in build-gpu-net/gpu-logs.
set -u
source=$(cd "$(dirname "$0")/../.." && pwd)
carried=$source/build-carry
if [ "${1:-}" = carry ]; then
    mkdir -p "$carried" && cp "$2/lib/libepx_ofi.so" "$carried/" || exit 1
    # libfabric and what it needs, but for libc's own parts
    ldd "$carried/libepx_ofi.so" | awk '$3 ~ /^\// { print $3 }' | grep -vE '/(libc|libm|libpthread|libdl|librt|ld-linux[^/]*)\.so' |
        xargs -I{} cp -L {} "$carried/"
    du -sh "$carried"
    exit 0
fi
percent=${1:-100}
build=$source/build-gpu-net
logs=$build/gpu-logs
mkdir -p "$logs"
if [ ! -e /dev/nvidiactl ]; then
    echo "skipped: no NVIDIA driver on this machine (/dev/nvidiactl)"
    exit 77
fi
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
generator=""
command -v ninja >/dev/null && generator="-G Ninja"
begin=$SECONDS
if ! { cmake -S "$source" -B "$build" $generator -DCMAKE_BUILD_TYPE=Release -DEPX_WITH_CUDA=ON -DEPX_WITH_PYTHON=OFF \
    -DEPX_CUDA_ARCHITECTURES="$arch-real" &&
    cmake --build "$build" -j "$(nproc)" --target epx_cuda gpu_test_domains gpu_test_graph gpu_test_bounds \
        gpu_test_differential; } >"$logs/build.log" 2>&1; then
    tail -40 "$logs/build.log"
    echo "the build failed: $logs/build.log"
    exit 1
fi
cmake --build "$build" -j "$(nproc)" --target epx_ofi >>"$logs/build.log" 2>&1 # where libfabric's headers are
if [ ! -e "$build/lib/libepx_ofi.so" ] && [ -e "$carried/libepx_ofi.so" ]; then
    cp "$carried/libepx_ofi.so" "$build/lib/"
    export LD_LIBRARY_PATH=$carried${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
echo "built in $((SECONDS - begin)) s for sm_$arch"

table=""
failed=0
# run NAME SECONDS COMMAND...
run() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1
    local rc=$? verdict
    case $rc in
    0) verdict=passed ;;
    77) verdict=skipped ;;
    124 | 137) verdict="no end in $limit s" failed=1 ;;
    *) verdict="FAILED ($rc)" failed=1 ;;
    esac
    table+=$(printf '%-26s %-16s %4d s  %s' "$name" "$verdict" "$((SECONDS - start))" "$(tail -1 "$logs/$name.log" | cut -c1-80)")$'\n'
    [ "$verdict" = passed ] || grep -v '0 wrong' "$logs/$name.log" | head -12
}

export EPX_TIMEOUT_MS=${EPX_TIMEOUT_MS:-2000} EPX_CUDA_DOMAINS=1
tests=$build/tests
# What can be told apart first: one small world after the other, then all.
run bounds-1-domain 20 "$tests/gpu_test_bounds"
run domains-loop 40 "$tests/gpu_test_domains" loop $((12 * percent / 100))
run domains-sim 40 "$tests/gpu_test_domains" sim:1 $((12 * percent / 100))
if [ -e "$build/lib/libepx_ofi.so" ]; then
    export EPX_NET=ofi:tcp
    run domains-tcp 70 "$tests/gpu_test_domains" ofi:tcp $((5 * percent / 100))
    EPX_TEST_PER_DOMAIN=1 run graph-domains-of-1 40 "$tests/gpu_test_graph" $((60 * percent / 100))
    EPX_TEST_PER_DOMAIN=2 EPX_TEST_RANKS_MAX=4 run suite-domains-of-2 60 "$tests/gpu_test_differential" "" $((4 * percent / 100))
else
    echo "no libepx_ofi.so here: nothing over ofi:tcp"
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
printf '%s' "$table"
# First figures, when all is right and there is time left: 2 domains of 1 rank.
if [ $failed = 0 ] && [ $((SECONDS - begin)) -lt 170 ] && [ -e "$build/lib/libepx_ofi.so" ]; then
    cmake --build "$build" -j "$(nproc)" >>"$logs/build.log" 2>&1 --target epx_command epx_bench_cuda &&
        EPX_TIMEOUT_MS=8000 timeout -k 5 45 "$build/bin/epx" bench --backend cuda --ranks 2 --domains 2 --net ofi:tcp \
            --op dispatch,dispatch_cached,combine --iters 5 --no-floor 2>&1 | tail -25
fi
exit $failed
