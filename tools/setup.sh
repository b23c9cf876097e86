#!/bin/bash
# Install what this machine lacks, on Debian 12 and Ubuntu 24.04: setup.sh [build|test|bench|all]
#
# git, make and build-essential are taken to be there. Each package is named with its reason. As root, or with sudo
# that asks nothing, they are installed by apt-get; else the command to run is printed and the exit code is 1.
# Quick when nothing is missing.
set -u
PATH=$PATH:/usr/sbin:/sbin # where depmod is, for others than root too
what=${1:-all}

# part | package | how to see that it is there | why
list() {
    cat <<'END'
build|build-essential|cc|C and C++ compilers
build|cmake|cmake|generates the build (3.25 or newer)
build|ninja-build|ninja|runs the build
build|pkg-config|pkg-config|finds libfabric; its files are tested after installing
build|libfabric-dev|pkg:libfabric|network plug-in libepx_ofi.so
test|spin|spin|checks the protocols' models (tests/model)
test|python3|python3|tests of the Python package
test|python3-venv|module:ensurepip|the virtual environment of those tests
test|qemu-system-x86|qemu-system-x86_64|boots the guest in which verbs is tested on soft-RoCE (tests/rxe)
test|busybox-static|busybox|the programs of that guest
test|cpio|cpio|packs that guest's files
test|kmod|depmod|prepares that guest's kernel modules
test|iproute2|ip|makes that guest's device; makes the network namespaces of the tests between hosts
test|ibverbs-providers|file:/usr/lib/*/libibverbs/librxe-rdmav*.so|libibverbs' side of soft-RoCE
test|clang-format-14|clang-format-14|make format, make check-format
bench|libopenmpi-dev|mpicc|the MPI program that epx is measured against (bench/peers)
bench|openmpi-bin|mpirun|runs that program
END
}

there() {
    case $1 in
    pkg:*) command -v pkg-config >/dev/null && pkg-config --exists "${1#pkg:}" ;;
    file:*) compgen -G "${1#file:}" >/dev/null ;;
    module:*) command -v python3 >/dev/null && python3 -c "import ${1#module:}" 2>/dev/null ;;
    *) command -v "$1" >/dev/null ;;
    esac
}

case $what in
build | test | bench | all) ;;
*)
    echo "setup.sh: '$what' is no part; the parts are build, test, bench and all" >&2
    exit 2
    ;;
esac

missing=()
while IFS='|' read -r part package probe why; do
    [ "$what" = all ] || [ "$what" = "$part" ] || continue
    there "$probe" && continue
    missing+=("$package")
    printf 'missing: %-16s %s\n' "$package" "$why"
done < <(list)
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "setup.sh: this is not Debian or Ubuntu; install these by your own means: ${missing[*]}" >&2
    exit 1
fi
root=()
if [ "$(id -u)" != 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        root=(sudo -n)
    else
        echo "setup.sh: not root, and sudo would ask for a password. Run this, then try again:" >&2
        echo "  sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
fi

known() { [ -n "$(apt-cache madison "$1" 2>/dev/null)" ]; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" >"$log" 2>&1 </dev/null; }

for package in "${missing[@]}"; do
    if ! known "$package"; then
        echo "setup.sh: updating the package lists"
        apt update || { tail -5 "$log" >&2; }
        break
    fi
done
echo "setup.sh: installing ${missing[*]}"
apt install -y --no-install-recommends "${missing[@]}" && exit 0
# Stale lists name versions that are gone: once more with fresh ones; then one by one, to name what is not to be had.
apt update && apt install -y --no-install-recommends "${missing[@]}" && exit 0
tail -5 "$log" >&2
lacking=()
for package in "${missing[@]}"; do
    apt install -y --no-install-recommends "$package" || lacking+=("$package")
done
[ ${#lacking[@]} -gt 0 ] || exit 0
echo "setup.sh: apt-get could not install: ${lacking[*]}" >&2
[ "$what" = test ] || exit 1
echo "setup.sh: the tests that need them will say so and skip themselves" >&2
