#!/bin/bash
# Low latency between domains on emulated kernels: the differential suite over every network, with few blocks and with
# more; slots through masks, releases and halves; deadlines; replayed graphs; a long run: ll_net.sh BUILD_FOLDER [rounds]
#
# As processes (tcp) at most six ranks: their kernels spin, and starve each other. Nine on two cores took 3 to 15 s beside
# other work, where none was ever wrong, and once outlasted a deadline of 20 s. As threads (loop, sim) all worlds run.
set -u
build=$(cd "$1" && pwd)
rounds=${2:-100}
out=$build/emulate/tests
export EPX_TEST_RANKS_MAX=6 EPX_EMULATE_SEED=${EPX_EMULATE_SEED:-1} EPX_TIMEOUT_MS=${EPX_TIMEOUT_MS:-60000}
export EPX_EMULATE_SMS=5,8,6,12,5,7,9,5 # each rank has a GPU of its own
failed=0
run() {
    echo "== $*"
    timeout 300 "$@" || failed=1
}
nets="loop sim:1"
[ -e "$build/emulate/lib/libepx_ofi.so" ] && nets="$nets ofi:tcp"
for net in $nets; do
    for part in "two" "one slot" "four" "three of" "masked" "one domain"; do
        run "$out/emulate_ll_net" "$net" 4 "$part"
    done
    run "$out/emulate_ll_net" "$net" 1 "long: two of one" "$rounds"
    run "$out/emulate_ll_net" "$net" 1 "released" "$rounds"
done
# One block, and three: a block then serves several far ranks, in turn.
EPX_SMS=1 run "$out/emulate_ll_net" sim:2 4 "three of"
EPX_SMS=3 run "$out/emulate_ll_net" sim:3 4 "four"
for each in 1 2; do
    export EPX_TEST_PER_DOMAIN=$each EPX_LL_INBAND=0
    EPX_NET=sim:4 run "$out/emulate_ll_slots" "" 12
    EPX_NET=loop run "$out/emulate_ll_graph" 5
done
EPX_NET=loop EPX_TEST_PER_DOMAIN=1 run "$out/emulate_ll_deadline"
EPX_NET=loop EPX_TEST_PER_DOMAIN=1 run "$out/emulate_ll_whole" 8
exit $failed
