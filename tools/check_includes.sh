#!/bin/bash
# The include directions of src/ (docs/ARCHITECTURE.md): check_includes.sh [SOURCE_FOLDER]
#
#   base -> plan -> bootstrap, device, net -> channel -> algo -> api -> python, tools
#
# A file may include: its own folder and the folders above it; the headers that lie directly in a folder further left
# (its interface; for src/api an algorithm such as algo/ll is a folder of its own). Never a folder further right, never a
# neighbour of the same level, never a sub-folder of another folder (its inside). Exceptions: device/cpu (waiting, bells,
# copies: the host's own tools) is open to the folders right of device, device/cuda to their .../cuda; net may use
# device.h (networks register what a device has allocated), device nothing of net; a plug-in's table names every
# algorithm's interface; the kernels of algo/ll use the waiting and the host state of the kernels of algo/ht.
# tools/epx uses the public API alone. CUDA and libfabric headers stay in the plug-ins' folders.
cd "${1:-$(dirname "$0")/..}" || exit 2
find src tools/epx \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null | sort |
    xargs -r grep -HnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*["<]' /dev/null | awk '
    BEGIN {
        level["base"] = 1; level["plan"] = 2; level["bootstrap"] = level["device"] = level["net"] = 3
        level["channel"] = 4; level["algo"] = 5; level["api"] = 6
    }
    function bad(why) { printf "%s:%s: includes %s: %s\n", file, line, included, why; failures++ }
    {
        split($0, part, ":"); file = part[1]; line = part[2]
        match($0, /["<][^">]*[">]/)
        quote = substr($0, RSTART, 1); included = substr($0, RSTART + 1, RLENGTH - 2)
        checked++
        folder = file; sub(/\/[^\/]*$/, "", folder)
        if (quote == "<") {
            if (included ~ /^(cuda|nvml)/ && folder !~ /\/cuda(\/|$)/) bad("CUDA headers belong to the plug-in")
            if (included ~ /^rdma\// && folder !~ /\/ofi(\/|$)/) bad("libfabric headers belong to the plug-in")
            next
        }
        if (file ~ /^tools\//) {
            if (included ~ /^\.\.|^(base|plan|bootstrap|device|net|channel|algo|api)\//) bad("tools use the public API alone")
            next
        }
        sub(/^src\//, "", folder)
        if (included ~ /\.\./) { bad("name it from src/"); next }
        to = included
        if (to !~ /\//) to = folder "/" to # beside the file
        if (to ~ /^epx\//) { bad("public headers are included with <>"); next }
        target = to; sub(/\/[^\/]*$/, "", target)
        if (index(folder "/", target "/") == 1) next          # own folder, or one above it
        own = folder; sub(/\/.*/, "", own)
        other = target; sub(/\/.*/, "", other)
        if (!(other in level)) { bad("no such layer"); next }
        if (!(own in level)) { bad("this folder is no layer"); next }
        kind = folder; sub(/.*\//, "", kind)
        if (target == "device/cpu" && level[own] > level["device"]) next
        if (kind == "cuda" && target == "device/cuda" && level[own] > level["device"]) next
        if (own == "net" && to == "device/device.h") next
        if (file ~ /\/plugin\.c$/ && target ~ /^algo\/[a-z]+$/) next
        if (folder == "algo/ll/cuda" && target == "algo/ht/cuda") next
        if (own == other) { bad("the inside of a sibling, or of a folder below"); next }
        if (level[other] > level[own]) { bad("a folder to the right"); next }
        if (level[other] == level[own]) { bad("a neighbour"); next }
        if (target ~ /^algo\/[a-z]+$/) next # the interface of an algorithm
        if (target ~ /\//) { bad("the inside of a folder"); next }
    }
    END { printf "%d includes checked, %d wrong\n", checked, failures; exit failures > 0 || checked == 0 }'
