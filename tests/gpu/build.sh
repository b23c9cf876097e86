# The programs that tests/gpu/all.sh runs: built here, or brought along built. Sourced; the caller sets source, out, limit.

gpu_programs=$(cd "$source/tests/gpu" && ls test_*.c | sed 's/^/gpu_/; s/[.].*//')

# What was built is of this source?
source_stamp() {
    (cd "$source" && find include src tools tests cmake CMakeLists.txt -type f \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' \
        -o -name '*.map' -o -name '*.cmake' -o -name CMakeLists.txt \) | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-16)
}

# build_programs FOLDER ARCHITECTURE JOBS. What does not compile leaves the rest alone.
build_programs() {
    local generator="" go_on="-- -k"
    command -v ninja >/dev/null && generator="-G Ninja" go_on="-- -k 0"
    cmake -S "$source" -B "$1" $generator -DCMAKE_BUILD_TYPE=Release -DEPX_WITH_CUDA=ON -DEPX_WITH_PYTHON=OFF \
        -DEPX_BUILD_EXAMPLES=OFF -DEPX_WERROR=OFF -DEPX_CUDA_ARCHITECTURES="$2" || return 1
    local ofi=""
    grep -q 'build epx_ofi:\|epx_ofi.dir' "$1/build.ninja" "$1/Makefile" 2>/dev/null && ofi="epx_ofi epx_bench_ofi"
    cmake --build "$1" -j "$3" --target epx epx_cuda epx_command epx_bench_cuda $ofi $gpu_programs $go_on
}

# carry: on a machine with nvcc and libfabric, into build-carry/ what one without needs: all programs for sm_90, and
# libfabric's libraries should it have none.
carry() {
    local made=$source/build-gpu to=$source/build-carry
    build_programs "$made" 90-real "${JOBS:-$(nproc)}" || return 1
    rm -rf "$to"
    mkdir -p "$to/bin" "$to/lib" "$to/tests" "$to/fabric"
    cp "$made/bin/epx" "$to/bin/" && cp -L "$made"/lib/*.so* "$to/lib/" && cp "$made"/tests/gpu_test_* "$to/tests/" || return 1
    if [ -e "$to/lib/libepx_ofi.so" ]; then # and what it needs, but for libc's own parts
        ldd "$to/lib/libepx_ofi.so" | awk '$3 ~ /^\// { print $3 }' |
            grep -vE '/(libc|libm|libpthread|libdl|librt|libgcc_s|libstdc\+\+|ld-linux[^/]*)\.so' | xargs -I{} cp -L {} "$to/fabric/"
    fi
    source_stamp >"$to/stamp"
    du -sh "$to"
}

# Sets build. The carried programs when they are of this source, run here and are for this GPU; else new ones.
find_or_build() { # SECONDS
    local arch text="" carried=$source/build-carry
    arch=$(timeout 20 nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
    build=$carried
    chmod +x "$carried"/bin/* "$carried"/tests/* 2>/dev/null
    if [ ! -e "$carried/stamp" ]; then
        text="none carried"
    elif [ "$(cat "$carried/stamp")" != "$(source_stamp)" ]; then
        text="carried ones are of another source"
    elif [ "$arch" != 90 ]; then
        text="carried ones are for sm_90, this is sm_$arch"
    elif ! timeout 20 "$carried/bin/epx" info >"$logs/info.log" 2>&1; then
        text="carried ones do not run: $(tail -1 "$logs/info.log")"
    elif ! grep -q '^ *cuda  *usable' "$logs/info.log"; then
        text="carried ones: $(grep '^ *cuda ' "$logs/info.log")"
    else
        row build carried 0 "$(du -sh "$carried" | cut -f1)"
        return 0
    fi
    local start=$SECONDS left=$((deadline - SECONDS)) verdict=passed jobs rc=0
    build=$source/build-gpu
    jobs=$(nproc)
    # A new bash, for timeout; it finds this file again.
    timeout -k 3 $((left < $1 ? left : $1)) bash -c "source='$source'; . '$source/tests/gpu/build.sh'; build_programs '$build' '$arch-real' $jobs" \
        >"$out/build.txt" 2>&1 </dev/null || rc=$?
    if [ $rc != 0 ]; then
        verdict="FAILED ($rc)"
        [ $rc != 124 ] || verdict=late
        touch "$logs/failed"
        grep -aE 'error|Error|FAILED' "$out/build.txt" | head -20 | cut -c1-200
    fi
    row build "$verdict" $((SECONDS - start)) "for sm_$arch; $text"
    # Where libfabric's headers are not: the plug-in that was carried, if it is of this source.
    if [ ! -e "$build/lib/libepx_ofi.so" ] && [ "$(cat "$carried/stamp" 2>/dev/null)" = "$(source_stamp)" ]; then
        cp "$carried"/lib/libepx*_ofi.so "$build/lib/" 2>/dev/null
    fi
    [ -e "$build/lib/libepx_cuda.so" ]
}

# Can the libfabric plug-in be opened? With this system's libfabric, else with the one that was carried.
find_fabric() {
    local plugin=$build/lib/libepx_ofi.so missing
    if [ ! -e "$plugin" ]; then
        row fabric absent 0 "no libepx_ofi.so: nothing over ofi:tcp"
        return 1
    fi
    missing=$(ldd "$plugin" 2>&1 | grep 'not found')
    if [ -n "$missing" ] && [ -e "$source/build-carry/fabric" ]; then
        fabric=$source/build-carry/fabric
        missing=$(LD_LIBRARY_PATH=$fabric ldd "$plugin" 2>&1 | grep 'not found')
    fi
    if [ -n "$missing" ]; then
        row fabric absent 0 "$(head -1 <<<"$missing" | tr -d '\t')"
        return 1
    fi
    row fabric here 0 "${fabric:-that of this system}"
}
