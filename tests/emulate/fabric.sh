#!/bin/bash
# Windows that go by (emulated) fabric handle: fabric.sh BUILD_FOLDER
set -u
tests=$(cd "$1" && pwd)/emulate/tests
export EPX_EMULATE_SEED=1 EPX_EMULATE_SHARED=80000
failed=0
run() { # EXIT_CODE COMMAND...
    local want=$1 rc=0
    shift
    echo "== $*"
    timeout 100 "$@" || rc=$?
    [ "$rc" = "$want" ] || { echo "FAILED: exit code $rc, not $want"; failed=1; }
}
run 0 "$tests/emulate_fabric"
EPX_EMULATE_FABRIC=0 run 77 "$tests/emulate_fabric"
# Every rank on a host of its own: one domain of them, high throughput and low latency.
export EPX_EMULATE_HOSTS=1
run 0 "$tests/emulate_fabric"
EPX_EMULATE_SMS=9,12 run 0 "$tests/emulate_ll" "two processes" 20
exit $failed
