#!/bin/bash
# Two hosts on one machine: run.sh NETNS_RANK
#
# Two network namespaces joined by a veth pair, two ranks in each; they meet at the first one's address and reach each
# other through that link alone. First dispatch and combine, compared with the reference. Then dispatches without end,
# and the link is taken down in the middle of one: every rank must get an error in time that names a rank of the other
# host, and end. Namespaces, processes and shared memory are gone afterwards. Exit code 77: cannot be made here.
set -u
program=${1:?run.sh NETNS_RANK}
PATH=$PATH:/usr/sbin:/sbin
a=epx-$$-a b=epx-$$-b
work=$(mktemp -d) || exit 1
started=()

cleanup() {
    for pid in "${started[@]:+${started[@]}}"; do kill -9 "$pid" 2>/dev/null; done
    ip netns del "$a" 2>/dev/null # the link goes with its end
    ip netns del "$b" 2>/dev/null
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
skip() {
    echo "skipped: $*"
    exit 77
}

command -v ip >/dev/null || skip "there is no ip (package iproute2)"
[ "$(id -u)" = 0 ] || skip "network namespaces need root"
said=$(ip netns add "$a" 2>&1 && ip netns add "$b" 2>&1) || skip "network namespaces cannot be made here: $said"
said=$(ip -n "$a" link add veth0 type veth peer name veth0 netns "$b" 2>&1) || skip "no veth pair here: $said"
for end in "$a 10.78.0.1" "$b 10.78.0.2"; do
    read -r space address <<<"$end"
    ip -n "$space" addr add "$address/24" dev veth0 && ip -n "$space" link set lo up &&
        ip -n "$space" link set veth0 up || exit 1
done

received() { # bytes that came over the link to the first host
    ip netns exec "$a" cat /sys/class/net/veth0/statistics/rx_bytes 2>/dev/null ||
        ip -n "$a" -s link show veth0 | awk '/RX:/ {getline; print $1}'
}

# start PORT ARGUMENT...: ranks 0 and 1 on the first host, 2 and 3 on the second. With `found` set, each finds out its
# own address.
found=
start() {
    local port=$1 rank space address
    shift
    started=()
    for rank in 0 1 2 3; do
        space=$a address=10.78.0.1
        [ "$rank" -lt 2 ] || { space=$b address=10.78.0.2; }
        env RANK=$rank WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 EPX_ROOT=10.78.0.1:$port EPX_ROOT_TOKEN=$$ ${found:-EPX_ADDRESS=$address} \
            EPX_NET=ofi:tcp EPX_RANKS_PER_DOMAIN=2 ip netns exec "$space" "$program" "$@" >"$work/out$rank" 2>&1 &
        started+=($!)
    done
}

# finish SECONDS: all must end by themselves with 0.
finish() {
    local late=$((SECONDS + $1)) pid wrong=0
    for pid in "${started[@]}"; do
        while kill -0 "$pid" 2>/dev/null && [ $SECONDS -lt $late ]; do sleep 0.05; done
        if kill -0 "$pid" 2>/dev/null; then
            echo "a rank is still there after $1 s"
            wrong=1
        else
            wait "$pid" || wrong=1
        fi
    done
    cat "$work"/out?
    [ $wrong = 0 ] || exit 1
    started=()
}

shared=$(ls /dev/shm 2>/dev/null | grep -c epx)
echo "== exchange"
before=$(received)
start 28071 exchange
finish 60
[ $(($(received) - before)) -gt 100000 ] || { echo "the link carried next to nothing: $before to $(received)"; exit 1; }

echo "== exchange, with addresses found"
found=EPX_ADDRESS=
start 28073 exchange
finish 60
found=

echo "== the link is cut in the middle of a dispatch"
start 28072 cut "$work"
for ((i = 0; i < 600; i++)); do
    [ -e "$work/0" ] && [ -e "$work/1" ] && [ -e "$work/2" ] && [ -e "$work/3" ] && break
    sleep 0.05
done
[ "$i" -lt 600 ] || { cat "$work"/out?; echo "the ranks did not begin"; exit 1; }
sleep 0.3
ip -n "$a" link set veth0 down
finish 20

left=$(ip netns pids "$a"; ip netns pids "$b")
[ -z "$left" ] || { echo "processes are left in the namespaces: $left"; exit 1; }
[ "$(ls /dev/shm 2>/dev/null | grep -c epx)" = "$shared" ] || { ls /dev/shm; echo "shared memory is left"; exit 1; }
echo "two hosts: passed"
