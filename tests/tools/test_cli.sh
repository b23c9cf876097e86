#!/bin/sh
# The `epx` command from outside: every refusal is one line and exit code 2; small runs of demo, bench and check are right.
#     test_cli.sh EPX refusals|demo|bench|bench_ll|check, test_cli.sh EPX spoiled libspoil.so
set -u
EPX=$1 PART=$2
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
PASSED=0 FAILED=0

note() { # WHAT: the last command's failure
    echo "FAILED: $1"
    sed 's/^/    | /' "$DIR/out" "$DIR/err" | head -n 20
    FAILED=$((FAILED + 1))
}

# refuse WORD ARGUMENTS...: exit code 2, nothing on stdout, one line on stderr that begins with "epx" and holds WORD.
refuse() {
    word=$1
    shift
    "$EPX" "$@" >"$DIR/out" 2>"$DIR/err"
    code=$?
    if [ $code -eq 2 ] && [ ! -s "$DIR/out" ] && [ "$(wc -l <"$DIR/err")" -eq 1 ] && grep -q "^epx" "$DIR/err" &&
        grep -qF -e "$word" "$DIR/err"; then
        PASSED=$((PASSED + 1))
    else
        note "epx $* (exit code $code): 2 and one line with \"$word\" expected"
    fi
}

# good WORD ARGUMENTS...: exit code 0 and WORD in what is printed.
good() {
    word=$1
    shift
    "$EPX" "$@" >"$DIR/out" 2>"$DIR/err"
    code=$?
    if [ $code -eq 0 ] && grep -qF -e "$word" "$DIR/out"; then
        PASSED=$((PASSED + 1))
    else
        note "epx $* (exit code $code): 0 and \"$word\" expected"
    fi
}

# bench ARGUMENTS...: right, and its JSON is JSON with every key, nothing wrong in it.
bench() {
    rm -f "$DIR/json"
    good "eff   wrong" bench --tokens 64 --hidden 256 --iters 3 --warmup 1 --json "$DIR/json" "$@"
    python3 - "$DIR/json" >"$DIR/out" 2>"$DIR/err" <<'PY'
import json, sys
rows = json.load(open(sys.argv[1]))
keys = ("op backend ranks domains net tokens hidden topk experts dtype sms time_us_median time_us_p99 logical_gbps "
        "wire_gbps floor_us efficiency wrong").split()
assert rows, "no objects"
for row in rows:
    assert sorted(row) == sorted(keys), sorted(row)
    assert row["wrong"] == 0 and row["time_us_median"] > 0 and row["time_us_p99"] >= row["time_us_median"], row
PY
    if [ $? -eq 0 ]; then PASSED=$((PASSED + 1)); else note "the JSON of bench $*"; fi
}

refusals() {
    refuse "a command is needed"
    refuse "is no command" dance
    refuse "is no command" help dance
    refuse "one argument too many" help bench demo
    refuse "one argument too many" version now
    for command in demo bench info check; do
        refuse "is no option" $command --rankz 2
        refuse "is no option" $command -r 2
        refuse "--ranks?" $command --rank 2
        refuse "needs a value" $command --ranks
        refuse "whole number" $command --ranks 0
        refuse "whole number" $command --ranks 99999
        refuse "whole number" $command --ranks two
        refuse "whole number" $command --ranks 2x
        refuse "whole number" $command --ranks ""
        refuse "whole number" $command --ranks 99999999999999999999
        refuse "whole number" $command --ranks=-1
        refuse "auto,cpu,cuda" $command --backend tpu
        refuse "auto,cpu,cuda" $command --backend cp
        refuse "is empty" $command --net ""
        refuse "must divide" $command --ranks 4 --domains 3
    done
    refuse "takes no value" demo --threads-as-ranks=yes
    refuse "takes no value" check --threads-as-ranks=1
    refuse "takes no value" bench --own-memory=1
    refuse "takes no value" bench --no-floor=1
    refuse "one argument too many" bench file
    refuse "one argument too many" info file
    refuse "one argument too many" check file
    refuse "one argument too many" demo one two
    refuse "dispatch,dispatch_cached" bench --op scatter
    refuse "dispatch,dispatch_cached" bench --op dispatch,
    refuse "at most 8" bench --op layout,layout,layout,layout,layout,layout,layout,layout,layout
    refuse "bf16,fp16,fp32,fp8" bench --dtype int8
    for option in --tokens --hidden --topk --experts --iters --warmup --sms --threads --seed --timeout; do
        refuse "whole number" bench $option many
        refuse "needs a value" bench $option
        refuse "whole number" bench $option -1
    done
    refuse "multiple of 16 bytes" bench --hidden 100
    refuse "multiple of 16 bytes" bench --hidden 8 --dtype fp8
    refuse "are there to choose" bench --topk 9 --experts 8
    refuse "whole number" bench --topk 33
    refuse "combine adds" bench --op combine --dtype fp8
    for option in --halves --pre-reduced --graph; do
        refuse "takes no value" bench $option=1
        refuse "only ll_dispatch, ll_combine and ll_pair" bench $option
        refuse "only ll_dispatch, ll_combine and ll_pair" bench $option --op dispatch,combine
    done
    refuse "a run of their own" bench --op ll_dispatch,combine
    refuse "a run of their own" bench --op layout,ll_pair
    refuse "takes bf16, or fp8" bench --op ll_pair --dtype fp16
    refuse "takes bf16, or fp8" bench --op ll_pair --dtype fp32
    refuse "multiple of 16 bytes" bench --op ll_pair --hidden 100
    refuse "multiple of 128" bench --op ll_dispatch --hidden 192 --dtype fp8
    refuse "no leases" bench --op ll_combine --own-memory
    refuse "no CUDA graphs" bench --op ll_pair --graph --backend cpu
    refuse "no CUDA graphs" bench --op ll_pair,ll_dispatch --graph --halves --pre-reduced --backend cpu
    if [ ! -e /dev/nvidiactl ]; then
        refuse "no CUDA graphs" bench --op ll_pair --graph
    fi
    refuse "cannot be read" bench --routing "$DIR/nothing"
    refuse "needs a value" bench --json
    refuse "cannot be written" bench --json "$DIR/nothing/json"
    refuse "cannot be written" bench --json "$DIR"
    refuse "cannot be read as a file" bench --routing "$DIR"
    refuse "line 1" bench --routing /dev/null
    for option in --tokens --hidden --topk --experts --slots; do
        refuse "the shape of --plan" info $option 8
    done
    refuse "multiple of 8" info --plan --hidden 7
    refuse "are there to choose" info --plan --topk 9 --experts 8
    refuse "is empty" bench --routing ""
    for option in --tokens --hidden --topk --experts --seed; do
        refuse "whole number" demo $option many
    done
    refuse "multiple of 32" demo --hidden 100
    refuse "are there to choose" demo --topk 9 --experts 8
    refuse "cannot be read" demo "$DIR/nothing"
    : >"$DIR/empty"
    refuse "is empty" demo "$DIR/empty"
    routing_files
}

# routing LINES...: a file of these lines.
routing() {
    printf '%s\n' "$@" >"$DIR/routing"
}

routing_files() {
    routing "hello" && refuse "line 1" bench --routing "$DIR/routing"
    routing "epx-routing 2 ranks 1 topk 1 experts 2" && refuse "line 1" bench --routing "$DIR/routing"
    routing "epx-routing 1 ranks 0 topk 1 experts 2" && refuse "line 1" bench --routing "$DIR/routing"
    routing "epx-routing 1 ranks 1 topk 40 experts 2" && refuse "line 1" bench --routing "$DIR/routing"
    routing "epx-routing 1 ranks 1 topk 1 experts 2" && refuse "tokens T0" bench --routing "$DIR/routing"
    routing "epx-routing 1 ranks 2 topk 1 experts 2" "tokens 1" && refuse "rank 1" bench --routing "$DIR/routing"
    routing "epx-routing 1 ranks 1 topk 1 experts 2" "tokens 1 1" && refuse "more than 1" bench --routing "$DIR/routing"
    routing "epx-routing 1 ranks 1 topk 1 experts 2" "tokens 2" 0 && refuse "ends after 1" bench --routing "$DIR/routing"
    routing "epx-routing 1 ranks 1 topk 1 experts 2" "tokens 1" 2 && refuse "line 3" bench --routing "$DIR/routing"
    routing "epx-routing 1 ranks 1 topk 2 experts 2" "tokens 1" "1 1" && refuse "twice" bench --routing "$DIR/routing"
    routing "epx-routing 1 ranks 1 topk 1 experts 2" "tokens 1" "1 0" && refuse "more than 1" bench --routing "$DIR/routing"
    routing "epx-routing 1 ranks 1 topk 1 experts 2" "tokens 1" 1 1 && refuse "more tokens" bench --routing "$DIR/routing"
}

demo() {
    good "0 wrong of" demo --backend cpu --tokens 300 --hidden 64
    good "0 wrong of" demo --backend cpu --tokens 300 --hidden 64 --threads-as-ranks --ranks 3 --experts 7 --topk 3
    good "0 wrong of" demo --backend cpu --tokens 2 --hidden 32 --ranks 4
    good "0 wrong of" demo --backend cpu --ranks 1 --tokens 50 --experts 1 --topk 1 "$0"
    good "usage: epx demo" demo --help
}

benches() {
    for ranks in 1 2 3; do
        bench --backend cpu --ranks $ranks --op dispatch,dispatch_cached,combine,layout
    done
    bench --backend cpu --ranks 2 --own-memory --dtype fp16
    bench --backend cpu --ranks 3 --threads-as-ranks --routing zipf --dtype fp32 --experts 10 --topk 3
    bench --backend cpu --ranks 2 --dtype fp8 --own-memory
    bench --backend cpu --ranks 2 --no-floor --op dispatch --tokens 0
    routing "# of a model" "epx-routing 1 ranks 2 topk 2 experts 4" "tokens 3 1" "0 1" "2 -1" "-1 -1  # nobody" "3 0"
    bench --backend cpu --ranks 2 --routing "$DIR/routing"
    bench --backend cpu --ranks 3 --routing "$DIR/routing"
    bench_domains
    good "usage: epx bench" bench --help
    good "usage: epx bench" help bench
}

# Between domains, where libfabric is: every operation has a floor.
bench_domains() {
    [ -e "$(dirname "$EPX")/../lib/libepx_bench_ofi.so" ] || return 0
    for how in "--ranks 2" "--ranks 4 --dtype fp32" "--ranks 4 --threads-as-ranks" "--ranks 2 --dtype fp8 --op dispatch" \
        "--ranks 2 --tokens 0"; do
        bench --backend cpu --domains 2 --net ofi:tcp $how
        ! grep -q '"floor_us": null' "$DIR/json" || note "bench --domains 2 $how: a floor of each operation"
    done
}

# ll ARGUMENTS...: all operations of low latency.
ll() {
    bench --backend cpu --op ll_dispatch,ll_combine,ll_pair "$@"
}

benches_ll() {
    for ranks in 1 2 4; do
        ll --ranks $ranks
        ll --ranks $ranks --threads-as-ranks --dtype fp8 --halves
        ll --ranks $ranks --pre-reduced --dtype fp8
        ll --ranks $ranks --threads-as-ranks --pre-reduced --halves
    done
    ll --ranks 3 --experts 10 --topk 3 --routing zipf --hidden 1152 --halves
    ll --ranks 4 --experts 3 --topk 3 --routing zipf --pre-reduced --dtype fp8 --hidden 128
    ll --ranks 2 --no-floor --tokens 0
    routing "epx-routing 1 ranks 2 topk 2 experts 4" "tokens 3 1" "0 1" "2 -1" "-1 -1" "3 0"
    ll --ranks 2 --routing "$DIR/routing" --pre-reduced
    ll --ranks 3 --routing "$DIR/routing"
    good "128 tokens a rank" bench --backend cpu --op ll_pair --hidden 256 --iters 2
    ll_domains
}

# Between domains.
ll_domains() {
    for how in "" "--dtype fp8" --pre-reduced "--halves --dtype fp8"; do
        ll --ranks 4 --domains 2 --net loop --threads-as-ranks $how
        grep -q '"domains": 2, "net": "loop"' "$DIR/json" || note "domains and net in the JSON"
    done
}

# spoiled WHAT ARGUMENTS...: with WHAT of every result spoiled, exit code 1 and wrong rows in the JSON of each operation.
spoiled() {
    what=$1
    shift
    rm -f "$DIR/json"
    EPX_SPOIL=$what LD_PRELOAD=$SPOIL "$EPX" bench --backend cpu --tokens 16 --hidden 128 --experts 4 --topk 3 --iters 1 \
        --warmup 0 --no-floor --json "$DIR/json" "$@" >"$DIR/out" 2>"$DIR/err"
    code=$?
    if [ $code -eq 1 ] && grep -q '"wrong": [1-9]' "$DIR/json" && ! grep -q '"wrong": 0}' "$DIR/json"; then
        PASSED=$((PASSED + 1))
    else
        note "bench $* with \"$what\" spoiled (exit code $code): 1 and wrong rows expected"
    fi
}

spoils() {
    SPOIL=$1
    EPX_SPOIL=nothing LD_PRELOAD=$SPOIL good ll_pair bench --backend cpu --op ll_pair --hidden 128 --experts 4 --topk 3
    for what in row source; do
        spoiled $what --op dispatch,dispatch_cached
    done
    for what in row:4 sum:6; do # rank 0's row, everywhere, and so what comes back to it; what comes back from rank 0
        EPX_SPOIL=${what%:*} LD_PRELOAD=$SPOIL "$EPX" check --backend cpu --ranks 3 >"$DIR/out" 2>"$DIR/err"
        if [ $? -eq 1 ] && grep -qF "${what#*:} of 9 pairs work" "$DIR/out"; then
            PASSED=$((PASSED + 1))
        else
            note "check with ${what%:*} spoiled: ${what#*:} of 9 pairs expected"
        fi
    done
    spoiled side --op dispatch,dispatch_cached --dtype fp8
    spoiled ids --op dispatch
    spoiled weights --op dispatch
    spoiled sum --op combine
    spoiled layout --op layout
    for halves in "" --halves; do
        for what in row source count range past; do
            spoiled $what --op ll_dispatch,ll_pair $halves
        done
        spoiled row --op ll_dispatch,ll_pair --dtype fp8 $halves
        spoiled scale --op ll_dispatch,ll_pair --dtype fp8 $halves
        spoiled sum --op ll_combine,ll_pair $halves
        spoiled sum --op ll_combine,ll_pair --pre-reduced $halves
    done
}

# wrong VARIABLE=VALUE WORD ARGUMENTS...: with that variable, exit code 1 and WORD on stderr.
wrong() {
    variable=$1 word=$2
    shift 2
    env "$variable" "$EPX" "$@" >"$DIR/out" 2>"$DIR/err"
    code=$?
    if [ $code -eq 1 ] && grep -qF -e "$word" "$DIR/err"; then
        PASSED=$((PASSED + 1))
    else
        note "$variable epx $* (exit code $code): 1 and \"$word\" expected"
    fi
}

variables() {
    wrong EPX_TIMEOUT_MS=soon 'EPX_TIMEOUT_MS is "soon"' info
    wrong EPX_STREAMING=yes 'EPX_STREAMING is "yes"; it must be auto, 0, 1 or halves' info --backend cpu
    [ -e "$(dirname "$EPX")/../lib/libepx_ofi.so" ] || return 0
    wrong EPX_NIC=nosuch0 nosuch0 info --backend cpu --domains 2
    for nic in $(ls /sys/class/net); do # those that are up; others are refused by name
        [ "$(cat "/sys/class/net/$nic/operstate")" = up ] || [ "$nic" = lo ] || continue
        EPX_NIC=$nic "$EPX" info --backend cpu --domains 2 >"$DIR/out" 2>"$DIR/err"
        if grep -qF -e " on $nic (" "$DIR/out" || grep -qF "EPX_NIC is \"$nic\"" "$DIR/err"; then
            PASSED=$((PASSED + 1))
        else
            note "EPX_NIC=$nic is not the interface taken"
        fi
    done
    EPX_NIC=lo good " on lo (" info --backend cpu --domains 2
    good "16 of 16 pairs work" check --backend cpu --ranks 4 --domains 2 --net ofi:tcp
}

# Why the CPU was chosen is said in full: as it is in the list of backends.
whole_reason() {
    "$EPX" info >"$DIR/out" 2>"$DIR/err"
    why=$(sed -n 's/^  cuda  *not usable: //p' "$DIR/out")
    [ -n "$why" ] || return 0 # a GPU is there
    if grep -q '^  backend .*no usable GPU' "$DIR/out" && ! grep -qF "no usable GPU: $why" "$DIR/out"; then
        note "epx info: the backend's reason is cut off"
    else
        PASSED=$((PASSED + 1))
    fi
}

check() {
    variables
    good "59023360 bytes" info --plan --ranks 8 --tokens 128 --hidden 7168 --topk 8 --experts 256
    refuse "whole number" info --plan --slots 0
    good "9 of 9 pairs work" check --backend cpu --ranks 3
    good "1 of 1 pairs work" check --backend cpu --ranks 1
    good "16 of 16 pairs work" check --backend cpu --ranks 4 --threads-as-ranks
    for net in loop sim; do # rows between domains too
        good "16 of 16 pairs work" check --backend cpu --ranks 4 --threads-as-ranks --domains 2 --net $net
        good "9 of 9 pairs work" check --backend cpu --ranks 3 --threads-as-ranks --domains 3 --net $net
    done
    good "EPX_TIMEOUT_MS" info --backend cpu
    whole_reason
    good "epx " version
    good "epx " --version
    good "usage: epx" help
    good "usage: epx" --help
}

case $PART in
refusals) refusals ;;
demo) demo ;;
bench | bench_ll)
    command -v python3 >/dev/null || { echo "skipped: python3 is not there to read the JSON"; exit 77; }
    if [ "$PART" = bench ]; then benches; else benches_ll; fi
    ;;
spoiled) spoils "$3" ;;
check) check ;;
*) echo "test_cli.sh: \"$PART\": refusals, demo, bench, bench_ll, spoiled or check is needed" && exit 2 ;;
esac
echo "$PASSED checks passed, $FAILED failed"
[ $FAILED -eq 0 ] && [ $PASSED -gt 0 ]
