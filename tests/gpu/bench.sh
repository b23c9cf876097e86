#!/bin/bash
# The figures of docs/measurements: epx bench on all GPUs of this machine, one rank each. tests/gpu/bench.sh BUILD [iterations]
set -u
bench="$1/bin/epx bench --backend cuda --iters ${2:-20}"
ranks=$(nvidia-smi -L | wc -l)
row() {
    echo "== $*"
    timeout -k 5 60 $bench --ranks "$ranks" "$@" 2>&1 | grep -v '^$'
}
row --sms 16 --op dispatch,dispatch_cached
row --sms 16 --op dispatch,dispatch_cached --dtype fp8
row --sms 8 --op dispatch_cached --no-floor
row --sms 28 --op dispatch_cached --own-memory --no-floor
row --sms 24 --op combine
row --sms 24 --op combine --own-memory --no-floor
row --op dispatch,dispatch_cached,combine,layout --no-floor
