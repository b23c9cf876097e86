#!/bin/bash
# Build libepx_cuda.so with emulated kernels, and tests of tests/gpu on it: build.sh BUILD_FOLDER OUT_FOLDER [CFLAGS]
# EMU_BULK=0: the plain way of sm_80 instead of the bulk copy engine. BUILD_FOLDER: a build of this tree, for its libepx_internal.a, libepx_test_common.a and libepx_ofi.so.
set -e
source=$(cd "$(dirname "$0")/../.." && pwd)
build=$(cd "$1" && pwd)
mkdir -p "$2/lib" "$2/tests" "$2/src"
out=$(cd "$2" && pwd)
cd "$source"
flags="-O1 -g -D_GNU_SOURCE -DEMU_BULK=${EMU_BULK:-1} -Itests/emulate -Iinclude -Isrc -Itests -fPIC ${3:-}"
internal=$(find "$build" -name libepx_internal.a | head -1)
common=$(find "$build" -name libepx_test_common.a | head -1)

# Launches, and variables in shared memory, are all of CUDA C that is not C++.
for cu in src/algo/ht/cuda/*.cu src/algo/ht/cuda/*.cuh; do
    mkdir -p "$out/src/$(dirname $cu)"
    sed -E -e 's/^( *)([A-Za-z_].*)<<<(.*)>>>\((.*)\);/\1emu_launch(\3, [emu_p = \4] { \2(emu_p); });/' \
        -e 's/^( *)extern __shared__ .*char shared\[\];/\1char *shared = emu_dynamic();/' \
        -e 's/^( *)__shared__ ([a-z_]+) ([a-z]+);/\1\2 \&\3 = *(\2 *)emu_shared(__FILE__, __LINE__, sizeof(\2));/' \
        "$cu" >"$out/src/$cu"
done
objects=""
for cu in "$out"/src/src/algo/ht/cuda/*.cu; do
    g++ -std=c++20 -I"$out/src/src" $flags -ffp-contract=off -Wall -Wno-volatile -Wno-unused-function -Wno-unknown-pragmas \
        '-DcudaLaunchKernel(k,b,t,a,s,m)=emu_launch_as<ht_combine_t>(k,b,t,a,s,m)' -include emulate.h -x c++ -c "$cu" -o "$cu.o"
    objects+=" $cu.o"
done
g++ -std=c++20 $flags -Wall -c tests/emulate/emulate.cpp -o "$out/src/emulate.o"
for c in src/algo/ht/cuda/*.c tests/emulate/*.c; do
    gcc -std=gnu11 $flags -Wall -c $c -o "$out/src/$(basename $c).o"
    objects+=" $out/src/$(basename $c).o"
done
g++ -shared ${3:-} -o "$out/lib/libepx_cuda.so" $objects "$out/src/emulate.o" "$internal" -lpthread -ldl -lm \
    -Wl,--exclude-libs,ALL -Wl,--version-script=src/plugin.map -Wl,-z,defs
cp -f "$build"/lib/libepx_ofi.so "$out/lib/" 2>/dev/null || true
for test in domains graph differential stress; do
    gcc -std=gnu11 $flags -Wall -o "$out/tests/emulate_$test" tests/gpu/test_$test.c "$common" "$internal" -lpthread -ldl -lm
done
