#!/bin/bash
# All that a machine with GPUs can say about epx, in one call of bounded time: build, tests, figures; one table at the end.
#
#   tests/gpu/all.sh [-m MINUTES] [SECTION...]    9.5 minutes if not said; sections below, all of them if none is named
#   tests/gpu/all.sh carry                        on a machine without a GPU: build here, into build-carry/ (build.sh)
#
# For one GPU or more. What one GPU or two can do runs on parts of them side by side; what wants all, and figures, alone;
# figures are of 2 ranks, and of 4 where there are as many GPUs. A section that is early leaves its time to those after it.
# With more minutes limits and iterations grow; with less, name sections. Kept, in $OUT or build-gpu/out, eight
# files at most: summary.txt, table.txt, failures.txt, log-{main,gpu0 to gpu3}.txt, or build.txt for one of these. Exit code
# 1 if anything went wrong. A step that has not half of its limit left is not begun: "no time", which is counted at the end.
set -u
source=$(cd "$(dirname "$0")/../.." && pwd)
minutes=9.5
if [ "${1:-}" = -m ]; then
    minutes=$2
    shift 2
fi
out=${OUT:-$source/build-gpu/out}
logs=$source/build-gpu/logs
fabric=""
. "$source/tests/gpu/steps.sh"
. "$source/tests/gpu/build.sh"
if [ "${1:-}" = carry ]; then
    carry
    exit
fi
gpus=$(timeout 20 nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || gpus=${#visible[@]}
if [ "$gpus" = 0 ] && [ ! -e /dev/nvidiactl ]; then
    echo "skipped: no NVIDIA driver on this machine (nvidia-smi lists no GPU, no /dev/nvidiactl)"
    exit 77
fi
ranks=$((gpus < 4 ? gpus : 4)) # of tests; of figures what a section says
worlds=$ranks
[ "$ranks" != 4 ] || worlds="2 4"
chosen=" $* "
for name in "$@"; do
    if ! grep -q "^section_$name() " "$0"; then
        echo "no section is called \"$name\"; there are: $(sed -n 's/^section_\([a-z0-9]*\)() .*/\1/p' "$0" | tr '\n' ' ')"
        exit 2
    fi
done
deadline=$(awk -v m="$minutes" 'BEGIN { print int(m * 60) - 10 }')
scale=$(awk -v m="$minutes" 'BEGIN { print (m > 9.5 ? int(m * 100 / 9.5) : 100) }')
mkdir -p "$out" "$logs"
rm -f "$out"/{table,failures,build}.txt "$out"/log-*.txt "$logs"/*
ulimit -c 0
export PYTHONUNBUFFERED=1

finish() {
    local line world
    { echo
        for line in $(cut -d' ' -f1 "$out/table.txt" | awk '!seen[$0]++'); do
            grep "^$line " "$out/table.txt"
        done
        for world in $worlds; do
            ll_table "$world" "$logs/benchll@$world"-{flags,inband,inband-96}-time.log
        done
        for world in $worlds; do
            grep -hE '^(us  |cached|combine|low-latency|  in a graph)' "$logs/cost@$world-cost.log" 2>/dev/null
        done
        timeout 10 nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c
        echo "$([ -e "$logs/failed" ] && echo "SOMETHING FAILED: failures.txt, log-*.txt" || echo "nothing failed"), no time for $(grep -c ' no time ' "$out/table.txt") steps, $SECONDS s"; } | tee "$out/summary.txt" | tail -c 11500
}
stop() {
    kill $(jobs -p) $(cat "$logs"/*.pid 2>/dev/null) 2>/dev/null
    touch "$logs/failed"
    finish
    exit 1
}
trap stop TERM INT HUP

# ---- tests: ranks as threads of one process, which starts CUDA once, or as processes ----

threads() { # NAME SECONDS COMMAND...
    EPX_TEST_RUNS=threads step "$@"
}
processes() { # NAME SECONDS COMMAND...
    local name=$1
    shift
    EPX_TEST_RUNS=processes step "$name-processes" "$@"
}
both() { # NAME SECONDS_OF_THREADS SECONDS_OF_PROCESSES COMMAND...
    local name=$1 first=$2 second=$3
    shift 3
    threads "$name" "$first" "$@"
    processes "$name" "$second" "$@"
}
use_fabric() { # where the system has no libfabric
    [ -z "$fabric" ] || export LD_LIBRARY_PATH=$fabric${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}

# ---- one GPU: a process costs 2 s and more, so with EPX_TEST_THREADS most cases that want some run as threads ----

section_net() { # domains, by the networks that there are
    export EPX_TIMEOUT_MS=10000
    use_fabric
    if [ -n "$ofi" ]; then
        export EPX_NET=ofi:tcp
        EPX_TEST_PER_DOMAIN=1 both graph-tcp 35 15 "$tests/gpu_test_graph" "$(pct 60)"
        EPX_TEST_PER_DOMAIN=2 EPX_TEST_RANKS_MAX=4 EPX_TEST_THREADS=1 threads suite-tcp 60 "$tests/gpu_test_differential" "" "$(pct 3)"
        EPX_TEST_PER_DOMAIN=2 EPX_TEST_RANKS_MAX=4 processes suite-tcp 20 "$tests/gpu_test_differential" "four ranks" "$(pct 3)"
        EPX_TEST_THREADS=1 threads domains-tcp 45 "$tests/gpu_test_domains" ofi:tcp "$(pct 4)"
        processes domains-tcp 45 "$tests/gpu_test_domains" ofi:tcp "$(pct 4)" "2 domains of 1"
    fi
    threads domains-loop 40 "$tests/gpu_test_domains" loop "$(pct 30)"
}
section_sim() { # as net, over a network that delays and reorders
    export EPX_TIMEOUT_MS=10000
    threads domains-sim 35 "$tests/gpu_test_domains" sim:1 "$(pct 6)"
}
section_llnet() { # low latency between domains: graphs, masks, long runs, every world
    export EPX_TIMEOUT_MS=10000 EPX_LL_INBAND=0 EPX_TEST_RANKS_MAX=4
    use_fabric
    EPX_NET=loop EPX_TEST_PER_DOMAIN=1 threads graphs 30 "$tests/gpu_test_ll_graph" "$(pct 40)"
    EPX_NET=loop EPX_TEST_PER_DOMAIN=1 threads deadline 25 "$tests/gpu_test_ll_deadline"
    [ -z "$ofi" ] || processes tcp 25 "$tests/gpu_test_ll_net" ofi:tcp "$(pct 4)" "two of two"
    [ -z "$ofi" ] || processes tcp-long 25 "$tests/gpu_test_ll_net" ofi:tcp 1 "long: two of one" "$(pct 300)"
    threads loop 45 "$tests/gpu_test_ll_net" loop "$(pct 8)" "" "$(pct 300)"
    threads sim 35 "$tests/gpu_test_ll_net" sim:1 "$(pct 8)"
    EPX_NET=sim:2 EPX_TEST_PER_DOMAIN=1 threads slots 30 "$tests/gpu_test_ll_slots" "" "$(pct 20)"
}
section_ll1() { # low latency, ranks share a GPU
    export EPX_TIMEOUT_MS=10000
    threads deadline 35 "$tests/gpu_test_ll_deadline"
    threads late 20 "$tests/gpu_test_ll_late"
    threads whole 30 "$tests/gpu_test_ll_whole" "$(pct 100)"
    EPX_LL_INBAND=0 threads flags 25 "$tests/gpu_test_ll" "" "$(pct 60)"
    EPX_LL_INBAND=0 EPX_TEST_RANKS_MAX=4 processes flags 35 "$tests/gpu_test_ll" "" "$(pct 20)"
    EPX_LL_INBAND=0 threads flags-slots 25 "$tests/gpu_test_ll_slots" "" "$(pct 20)"
    EPX_LL_INBAND=1 threads inband 30 "$tests/gpu_test_ll" "" "$(pct 100)"
    EPX_LL_INBAND=1 EPX_TEST_RANKS_MAX=4 processes inband 35 "$tests/gpu_test_ll" "" "$(pct 20)"
    EPX_LL_INBAND=1 threads inband-slots 30 "$tests/gpu_test_ll_slots" "" "$(pct 40)"
    EPX_LL_INBAND=1 threads inband-graphs 30 "$tests/gpu_test_ll_graph" "$(pct 30)"
}
section_ht1() { # high throughput in one domain, ranks share a GPU
    export EPX_TIMEOUT_MS=10000
    both order 25 60 "$tests/gpu_test_order"
    threads laps 20 "$tests/gpu_test_laps"
    processes bounds 45 "$tests/gpu_test_bounds"
    both graphs 30 15 "$tests/gpu_test_graph" "$(pct 60)"
    EPX_TEST_RANKS_MAX=4 EPX_TEST_THREADS=1 threads differential 60 "$tests/gpu_test_differential" "" "$(pct 20)"
    EPX_TEST_RANKS_MAX=4 processes differential 45 "$tests/gpu_test_differential" "ranks" "$(pct 1)"
    EPX_TEST_THREADS=1 threads stress 45 "$tests/gpu_test_stress" "" "$(pct 4)"
}

# ---- all GPUs, or two of them ----

section_ll() {
    export EPX_TIMEOUT_MS=10000 EPX_TEST_RANKS_MAX=4
    threads deadline 35 "$tests/gpu_test_ll_deadline"
    EPX_LL_INBAND=0 both flags 20 20 "$tests/gpu_test_ll" "" "$(pct 20)"
    EPX_LL_INBAND=1 both inband 20 20 "$tests/gpu_test_ll" "" "$(pct 60)"
    EPX_LL_INBAND=1 threads inband-slots 25 "$tests/gpu_test_ll_slots" "" "$(pct 20)"
    EPX_LL_INBAND=1 threads inband-graphs 25 "$tests/gpu_test_ll_graph" "$(pct 40)"
}
section_ht() {
    export EPX_TIMEOUT_MS=10000
    both order 20 35 "$tests/gpu_test_order"
    threads laps 15 "$tests/gpu_test_laps"
    EPX_TEST_RANKS_MAX=4 EPX_TEST_THREADS=1 threads differential 20 "$tests/gpu_test_differential" "" "$(pct 20)"
    EPX_TEST_RANKS_MAX=4 processes differential 25 "$tests/gpu_test_differential" "ranks" "$(pct 4)"
    both graphs 20 10 "$tests/gpu_test_graph" "$(pct 60)"
}
section_rest() { # with the time that is left: most of it ran on one GPU or as threads before
    export EPX_TIMEOUT_MS=10000
    use_fabric
    EPX_LL_INBAND=1 processes inband-eight 25 "$tests/gpu_test_ll" "eight processes" "$(pct 20)"
    EPX_LL_INBAND=0 processes flags-eight 25 "$tests/gpu_test_ll" "eight processes" "$(pct 20)"
    [ -z "$ofi" ] || processes domains-tcp 25 "$tests/gpu_test_domains" ofi:tcp "$(pct 4)" "3 domains of"
    processes stress 40 "$tests/gpu_test_stress" "" "$(pct 1)"
    processes bounds 25 "$tests/gpu_test_bounds"
    EPX_TEST_THREADS=1 threads stress 30 "$tests/gpu_test_stress" "" "$(pct 1)"
    EPX_TEST_RANKS_MAX=4 processes differential 100 "$tests/gpu_test_differential" "" "$(pct 2)"
}
bench() { # NAME ARGUMENTS...
    local name=$1
    shift
    EPX_TIMEOUT_MS=10000 step "$name" 25 "$build/bin/epx" bench --backend cuda --iters 20 --ranks "$ranks" "$@"
}
section_benchht() {
    bench bf16-16 --sms 16 --op dispatch,dispatch_cached
    bench combine-24 --sms 24 --op combine
    bench fp8-16 --sms 16 --op dispatch,dispatch_cached --dtype fp8
    bench own-28 --sms 28 --op dispatch_cached --own-memory --no-floor
    bench combine-own-24 --sms 24 --op combine --own-memory --no-floor
    bench bf16-8 --sms 8 --op dispatch_cached --no-floor
    bench bf16-20 --sms 20 --op dispatch_cached,combine --no-floor
    bench default --op dispatch,dispatch_cached,combine,layout --no-floor
}
section_benchll() {
    local way
    export EPX_TIMEOUT_MS=10000
    EPX_LL_INBAND=0 threads flags-time 15 "$tests/gpu_test_ll_graph" 0 "$ranks"
    EPX_LL_INBAND=1 threads inband-time 15 "$tests/gpu_test_ll_graph" 0 "$ranks"
    EPX_LL_INBAND=1 EPX_SMS=96 threads inband-96-time 15 "$tests/gpu_test_ll_graph" 0 "$ranks"
    for way in 0 1; do
        export EPX_LL_INBAND=$way
        bench graph-fp8-$way --op ll_dispatch,ll_combine,ll_pair --dtype fp8 --graph
        bench graph-bf16-$way --op ll_dispatch,ll_pair --graph
        bench graph-pre-$way --op ll_combine,ll_pair --dtype fp8 --pre-reduced --graph
        bench calls-fp8-$way --op ll_dispatch,ll_combine,ll_pair --dtype fp8
        bench halves-fp8-$way --op ll_pair --dtype fp8 --halves --graph --no-floor
    done
}
section_benchnet() {
    use_fabric
    [ -n "$ofi" ] || return
    bench tcp --ranks 2 --domains 2 --net ofi:tcp --iters 5 --op dispatch,dispatch_cached,combine
    bench tcp-2x2 --ranks 4 --domains 2 --net ofi:tcp --iters 5 --op dispatch_cached,combine
    bench tcp-2x2-threads --ranks 4 --domains 2 --net ofi:tcp --iters 5 --op dispatch_cached,combine --threads-as-ranks
    # Sixteen processes start for 20 s.
    EPX_TIMEOUT_MS=20000 step tcp-2x8 60 "$build/bin/epx" bench --backend cuda --ranks 16 --domains 2 --net ofi:tcp \
        --iters 3 --warmup 1 --tokens 256 --op dispatch,dispatch_cached,combine
}
section_fault() { # which waits for deadlines most of its time
    export EPX_TIMEOUT_MS=10000
    both fault 60 30 "$tests/gpu_test_fault"
    processes fabric 15 "$tests/gpu_test_fabric"
}
# Between domains, more ranks than GPUs; as processes a GPU runs its ranks' kernels one by one.
section_llmany() {
    export EPX_TIMEOUT_MS=20000 EPX_TEST_RANKS_MAX=4
    EPX_LL_INBAND=0 threads loop 20 "$tests/gpu_test_ll_net" loop "$(pct 8)" "two of two"
    use_fabric
    [ -n "$ofi" ] || return
    processes tcp-2x2 20 "$tests/gpu_test_ll_net" ofi:tcp "$(pct 8)" "two of two"
    processes tcp-4x1 20 "$tests/gpu_test_ll_net" ofi:tcp "$(pct 8)" "four"
    processes tcp-masked 20 "$tests/gpu_test_ll_net" ofi:tcp "$(pct 8)" "masked"
}
section_many() {
    export EPX_TIMEOUT_MS=20000
    threads loop-2x2 20 "$tests/gpu_test_domains" loop "$(pct 6)" "2 domains of 2"
    threads loop-2x8 20 "$tests/gpu_test_domains" loop "$(pct 4)" "2 domains of 8"
    threads sim-2x8 20 "$tests/gpu_test_domains" sim:1 "$(pct 4)" "2 domains of 8"
    use_fabric
    [ -n "$ofi" ] || return
    processes tcp-4x1 30 "$tests/gpu_test_domains" ofi:tcp "$(pct 4)" "4 domains of 1"
    processes tcp-2x2 25 "$tests/gpu_test_domains" ofi:tcp "$(pct 4)" "2 domains of 2"
    # Threads: as processes, of which a GPU serves one at a time, a half takes 50 to 80 ms; those are for the bench.
    EPX_TEST_THREADS=1 threads tcp-2x8 20 "$tests/gpu_test_domains" ofi:tcp "$(pct 4)" "2 domains of 8"
}
pytests() { # NAME SECONDS FILES TESTS...
    # Other plug-ins of pytest cost time, and may start CUDA before ranks are forked.
    export EPX_LIBRARY=$build/lib/libepx.so PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
    local name=$1 seconds=$2 limit="" files="" file
    for file in $3; do
        files="$files $source/tests/python/$file"
    done
    shift 3
    python3 -c 'import pytest_timeout' 2>/dev/null && limit="-p pytest_timeout --timeout 40"
    step "$name" "$seconds" python3 -m pytest -v -p no:cacheprovider --tb=short $limit $files "$@"
}
section_py1() {
    pytests one-rank 80 test_gpu.py -k "1]"
}
section_python() {
    pytests two-ranks 60 test_gpu.py -k "2] or test_late or other_device"
    if [ "$ranks" = 4 ]; then
        pytests programs 50 test_deep_ep.py -k "1] or 2] or 2-1] or 4] or 4-2]"
    else
        pytests programs 40 test_deep_ep.py -k "1] or 2] or 2-1]"
    fi
}
section_cost() {
    # No torchrun: its ranks are sessions of their own, which a timeout does not end.
    export EPX_LIBRARY=$build/lib/libepx.so
    export EPX_TIMEOUT_MS=10000 PYTHONPATH=$source/python MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 WORLD_SIZE=$ranks
    step cost 40 bash -c 'for ((r = 0; r < WORLD_SIZE; r++)); do RANK=$r LOCAL_RANK=$r python3 "$1" --iters 30 --bench "$2" & p="${p:-} $!"; done
        for r in $p; do wait $r || exit 1; done' - "$source/bench/python_cost.py" "$build/bin/epx"
}
# compute-sanitizer; ranks are processes, since it runs a process's kernels one after the other.
sanitize() { # TOOL
    local tool=$1 sanitizer="compute-sanitizer --target-processes all --error-exitcode 9 --tool $1"
    export EPX_TIMEOUT_MS=60000
    use_fabric
    EPX_LL_INBAND=1 step ll-inband-$tool 30 $sanitizer "$tests/gpu_test_ll" "two processes" 4
    [ -z "$ofi" ] || EPX_TEST_PER_DOMAIN=1 EPX_NET=ofi:tcp step net-$tool 30 $sanitizer "$tests/gpu_test_bounds" 2
    step bounds-$tool 30 $sanitizer "$tests/gpu_test_bounds" 2
    EPX_LL_INBAND=0 step ll-flags-$tool 30 $sanitizer "$tests/gpu_test_ll" "two processes" 4
}
section_memcheck() {
    sanitize memcheck
}
section_racecheck() {
    sanitize racecheck
}

# sections NAME[@RANKS]=SECONDS...: those that were chosen, each in a shell of its own, which keeps its environment
sections() {
    local s name
    for s in "$@"; do
        name=${s%=*}
        [[ $chosen == "  " || $chosen == *" ${name%@*} "* ]] || continue
        ([[ $name != *@* ]] || ranks=${name#*@}
            begin_section "$name" "${s#*=}" && "section_${name%@*}")
    done
}
lane() { # NUMBER[,NUMBER] SECTIONS...: on those GPUs alone, beside the other lanes
    local second=${1#*,}
    lane=gpu${1%,*}
    export CUDA_VISIBLE_DEVICES=${visible[${1%,*}]}
    [ "$second" = "$1" ] || CUDA_VISIBLE_DEVICES+=,${visible[$second]}
    shift
    sections "$@"
}

section=machine
row gpus "$gpus" 0 "$(nproc) cores, $(nvcc --version 2>/dev/null | grep -o 'release [0-9.]*'), $(python3 -V 2>&1)"
{ ls -l /dev/nvidia*; timeout 20 nvidia-smi; timeout 20 nvidia-smi topo -m; lscpu; hostname -I; cat /proc/net/dev; free -g; } >"$out/log-main.txt" 2>&1
if [ "$gpus" = 0 ] || ! find_or_build 120; then
    touch "$logs/failed"
    finish
    exit 1
fi
tests=$build/tests
[ -e "$logs/info.log" ] || timeout 20 "$build/bin/epx" info >"$logs/info.log" 2>&1
cat "$logs/info.log" >>"$out/log-main.txt"
ofi=""
find_fabric && ofi=yes

if [ "$gpus" -ge 4 ]; then
    lane 0 net=140 &
    lane 1 ll1=120 sim=40 &
    lane 2 ht1=140 &
    lane 3 llnet=100 memcheck=60 &
    wait
elif [ "$gpus" -gt 1 ]; then
    lane 0 net=130 llnet=80 memcheck=40 &
    lane 1 ll1=110 ht1=120 sim=35 &
    wait
else
    sections ll1=90 net=110 sim=30 llnet=70 ht1=110 py1=80
fi
[ "$gpus" = 1 ] || sections ll=100 ht=110
for world in $worlds; do
    sections benchll@$world=60 benchht@$world=50
done
sections benchnet=100
for world in $worlds; do
    sections cost@$world=45
done
sections python=100
if [ "$gpus" -ge 4 ]; then
    lane 0,1 racecheck=60 fault=75 llmany=50 &
    lane 2,3 many=90 py1=90 &
    wait
elif [ "$gpus" -gt 1 ]; then
    sections llmany=40 many=60 fault=60 racecheck=60 py1=60
else
    sections memcheck=70 llmany=40 many=60 racecheck=60
fi
sections rest=220
finish
[ ! -e "$logs/failed" ]
