#!/bin/busybox sh
# The guest's only program of its own (run.sh makes it /init): modules, a soft-RoCE device, the cases, power off.
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/usr/sbin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/infiniband
mount -t tmpfs shm /dev/shm

stop() {
    [ $# = 0 ] || echo "epx-rxe: $*"
    sync
    poweroff -f
}
while read -r module; do
    insmod "/lib/modules/$module" || stop "no module $module"
done </lib/modules/order
mount -t configfs config /sys/kernel/config 2>/dev/null

# The real `ip`: busybox's own knows no types.
ip=$(ls /usr/bin/ip /usr/sbin/ip /sbin/ip 2>/dev/null | head -n 1)
$ip link set lo up
$ip link add roce type dummy || stop "no dummy interface"
$ip addr add 10.77.0.1/24 dev roce
$ip link set roce up
rdma link add rxe0 type rxe netdev roce || stop "no soft-RoCE device"
for i in 1 2 3 4 5 6 7 8 9 10; do
    grep -q ACTIVE /sys/class/infiniband/rxe0/ports/1/state && break
    sleep 0.2
done
echo "epx-rxe: device $(rdma link show)"

ulimit -l unlimited
ulimit -c 0
# What the soft device allows: its completion queues hold 32,767 entries, and ofi_rxm asks for FI_UNIVERSE_SIZE times
# what one connection needs.
# No handlers of libpsm's: a crash is for the kernel to tell.
export HFI_NO_BACKTRACE=1 IPATH_NO_BACKTRACE=1
export FI_UNIVERSE_SIZE=8 EPX_ADDRESS=10.77.0.1 EPX_TEST_ADDRESS=10.77.0.1

# Run one case: run NAME COMMAND... A second time when it fails, and it says so: with many threads on an emulated
# machine, peers that connect to each other at the same moment now and then lose their connection for good in libfabric
# 1.17's verbs;ofi_rxm. What is really broken fails twice.
once() {
    start=$(cut -d. -f1 /proc/uptime)
    timeout -s KILL 60 "$@" >/tmp/out 2>&1
    rc=$?
    took=$(($(cut -d. -f1 /proc/uptime) - start))
    tail -n 25 /tmp/out
    [ $rc = 0 ] || dmesg | grep 'segfault\|general protection' | tail -n 3
    return $rc
}
run() {
    name=$1
    shift
    if once "$@"; then
        echo "epx-rxe: passed $name ($took s)"
    elif echo "epx-rxe: once more: $name ended with code $rc ($took s)" && once "$@"; then
        echo "epx-rxe: passed $name the second time ($took s)"
    else
        echo "epx-rxe: FAILED $name with code $rc ($took s)"
    fi
}
. /epx/cases.sh
stop done
