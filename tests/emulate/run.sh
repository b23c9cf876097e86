#!/bin/bash
# The kernels of src/algo/ht/cuda as fibers (README.md), put through tests of tests/gpu, inside a domain and between
# domains: run.sh BUILD_FOLDER [percent of the iterations]
set -u
build=$(cd "$1" && pwd)
percent=${2:-2}
out=$build/emulate
export EPX_TEST_RANKS_MAX=4 EPX_EMULATE_SEED=${EPX_EMULATE_SEED:-1}
failed=0
run() {
    echo "== $*"
    timeout 300 "$@" || failed=1
}
run "$out/tests/emulate_domains" loop $((percent * 2))
EPX_EMULATE_SEED=2 run "$out/tests/emulate_domains" sim:1 "$percent"
EPX_EMULATE_NAPS=60 run "$out/tests/emulate_domains" sim:1 1 leaves
EPX_EMULATE_NAPS=60 run "$out/tests/emulate_domains" loop 1 leaves
[ -e "$out/lib/libepx_ofi.so" ] && run "$out/tests/emulate_domains" ofi:tcp "$percent"
EPX_EMULATE_SMS=132 run "$out/tests/emulate_domains" loop "$percent" "2 domains of 8"
export EPX_EMULATE_SHARED=80000 # combine inside a domain takes no less
run "$out/tests/emulate_graph" 10
EPX_TEST_PER_DOMAIN=1 EPX_NET=ofi:tcp run "$out/tests/emulate_graph" 5
run "$out/tests/emulate_differential" "" "$percent"
EPX_EMULATE_SMS=12 run "$out/tests/emulate_differential" "holes, own" 100
run "$out/tests/emulate_bounds"
EPX_EMULATE_SMS=168 EPX_EMULATE_SHARED=16384 run "$out/tests/emulate_laps" # 56 for a rank, 11 warps a block
run "$out/tests/emulate_fault"
run "$out/tests/emulate_order" 3
if [ -e "$out/lib/libepx_ofi.so" ]; then
    EPX_EMULATE_SMS=80 EPX_TEST_PER_DOMAIN=2 EPX_NET=ofi:tcp run "$out/tests/emulate_differential" "" "$percent"
fi
exit $failed
