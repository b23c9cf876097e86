#!/bin/bash
# tools/check_includes.sh finds what it is there to find: can_fail.sh SOURCE_FOLDER
check=$1/tools/check_includes.sh
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
failed=0
try() { # FILE INCLUDE good|bad
    rm -rf "$work/src" "$work/tools"
    mkdir -p "$work/$(dirname "$1")"
    echo "#include $2" >"$work/$1"
    if bash "$check" "$work" >/dev/null; then got=good; else got=bad; fi
    [ "$got" = "$3" ] || { echo "$1 including $2 is $3, but was called $got"; failed=1; }
}
try src/plan/a.c '"base/fail.h"' good
try src/base/a.c '"plan/routing.h"' bad
try src/device/cpu/a.c '"net/net.h"' bad
try src/device/cpu/a.c '"device/device.h"' good
try src/device/cpu/a.c '"cpu_inside.h"' good
try src/net/a.c '"device/device.h"' good
try src/net/a.c '"device/cpu/copy.h"' bad
try src/net/a.c '"bootstrap/bootstrap.h"' bad
try src/channel/a.c '"net/loop/loop.h"' bad
try src/channel/a.c '"net/net.h"' good
try src/algo/ht/cpu/a.c '"algo/ll/ll.h"' bad
try src/algo/ht/cpu/a.c '"algo/exchange.h"' good
try src/algo/ht/cpu/a.c '"device/cpu/copy.h"' good
try src/algo/ht/cpu/a.c '"device/cuda/copy.h"' bad
try src/algo/ht/cuda/a.c '"device/cuda/copy.h"' good
try src/bootstrap/a.c '"device/cpu/wait.h"' bad
try src/api/a.c '"algo/ht/cpu/ht.h"' bad
try src/api/a.c '"algo/ll/ll.h"' good
try src/api/a.c '"../algo/exchange.h"' bad
try src/api/a.c '<rdma/fabric.h>' bad
try src/base/a.h '<cuda_runtime.h>' bad
try tools/epx/a.c '"base/fail.h"' bad
try tools/epx/a.c '<epx/epx.h>' good
[ "$failed" = 0 ] && echo "23 cases right"
exit "$failed"
