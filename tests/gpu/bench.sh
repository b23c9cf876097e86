#!/bin/bash
# The figures of docs/measurements: epx bench on all GPUs of this machine, one rank each.
# tests/gpu/bench.sh BUILD [iterations] [ht|ll|all]. Exit code 1 if a row was wrong or a run did not end well.
set -u
set -o pipefail
bench="$1/bin/epx bench --backend cuda --iters ${2:-20}"
part=${3:-all}
ranks=$(nvidia-smi -L | wc -l)
failed=0
row() {
    echo "== $*"
    timeout -k 5 60 $bench --ranks "$ranks" "$@" 2>&1 | grep -v '^$' || failed=1
}
if [ "$part" != ll ]; then
    row --sms 16 --op dispatch,dispatch_cached
    row --sms 16 --op dispatch,dispatch_cached --dtype fp8
    row --sms 8 --op dispatch_cached --no-floor
    row --sms 28 --op dispatch_cached --own-memory --no-floor
    row --sms 24 --op combine
    row --sms 24 --op combine --own-memory --no-floor
    row --op dispatch,dispatch_cached,combine,layout --no-floor
fi
if [ "$part" != ht ]; then
    for how in "" "--graph"; do
        row --op ll_dispatch,ll_combine,ll_pair $how
        row --op ll_dispatch,ll_combine,ll_pair --dtype fp8 $how
        row --op ll_dispatch,ll_combine,ll_pair --dtype fp8 --pre-reduced $how
        row --op ll_pair --dtype fp8 --halves $how
    done
fi
exit $failed
