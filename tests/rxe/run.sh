#!/bin/bash
# verbs without hardware: run.sh BUILD [CASES [PROGRAM...]]
#
# Boots a guest by QEMU's software emulation (no KVM is asked for) with Debian's own kernel, makes a soft-RoCE device
# over a dummy interface there, and runs the conformance suites and a small differential suite over libfabric's verbs
# provider. The kernel package is unpacked into a cache, not installed. The guest's files are made at each run from
# what is installed here: busybox, ip, rdma, the verbs libraries, libfabric, and the programs of BUILD.
#
# CASES: what to run there instead of cases.sh; PROGRAM: what it needs besides, of BUILD/tests. Exit code 77: cannot be
# had here, reason on the last line. The guest has EPX_RXE_SECONDS (default 400; some 60 where nothing else runs) to finish.
set -u
build=${1:?run.sh BUILD [CASES [PROGRAM...]]}
shift
here=$(cd "$(dirname "$0")" && pwd)
build=$(cd "$build" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/epx/rxe
seconds=${EPX_RXE_SECONDS:-400}
modules=(udp_tunnel ip6_udp_tunnel ib_core ib_uverbs rdma_rxe configfs ib_cm iw_cm rdma_cm rdma_ucm dummy crc32_generic
    crc32c_generic)

skip() {
    echo "skipped: $*"
    exit 77
}

# ---- what is needed ----
PATH=$PATH:/usr/sbin:/sbin
[ "$(uname -m)" = x86_64 ] || skip "the guest is an x86-64 one, this machine is $(uname -m)"
for tool in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio depmod:kmod ip:iproute2 rdma:iproute2 \
    apt-get:apt dpkg-deb:dpkg; do
    command -v "${tool%%:*}" >/dev/null || skip "there is no ${tool%%:*} (package ${tool##*:}); tools/setup.sh test"
done
[ -e "$build/lib/libepx_ofi.so" ] || skip "built without libfabric"
provider=$(compgen -G "/usr/lib/*/libibverbs/librxe-rdmav*.so" | head -1)
[ -n "$provider" ] || skip "there is no librxe of libibverbs (package ibverbs-providers); tools/setup.sh test"

# ---- Debian's kernel, unpacked once into the cache ----
fetch_kernel() {
    local name deb parts=(./boot/vmlinuz-*)
    name=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
    [ -n "$name" ] || { echo "the package lists know no linux-image-amd64"; return 1; }
    rm -rf "$cache/new" && mkdir -p "$cache/new" && chmod 755 "$cache/new" || return 1
    (cd "$cache/new" && timeout 120 apt-get -qq download "$name" >log 2>&1) ||
        { echo "apt-get download $name: $(grep -v '^W:' "$cache/new/log" | tail -1)"; return 1; }
    deb=$(compgen -G "$cache/new/*.deb" | head -1)
    parts=('./boot/vmlinuz-*' './lib/modules/*/modules.*')
    for folder in drivers/infiniband drivers/net/dummy.ko net fs/configfs crypto lib arch/x86/crypto; do
        parts+=("./lib/modules/*/kernel/$folder*")
    done
    # Some patterns find nothing where those parts are built in: what counts is what there is afterwards.
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$cache/new" --wildcards "${parts[@]}" 2>/dev/null
    compgen -G "$cache/new/boot/vmlinuz-*" >/dev/null || { echo "$name holds no kernel"; return 1; }
    rm -f "$deb"
    rm -rf "$cache/kernel" && mv "$cache/new" "$cache/kernel"
}

mkdir -p "$cache" || skip "cannot make $cache"
exec 9>"$cache/lock"
flock -w 200 9 || skip "another run holds $cache/lock"
if ! compgen -G "$cache/kernel/boot/vmlinuz-*" >/dev/null; then
    said=$(fetch_kernel) || skip "no kernel for the guest: $said"
fi
kernel=$(compgen -G "$cache/kernel/boot/vmlinuz-*" | sort -V | tail -1)
version=${kernel##*/vmlinuz-}
[ -e "$cache/kernel/lib/modules/$version/modules.dep.bin" ] || depmod -b "$cache/kernel" "$version"
flock -u 9

# ---- the guest's files ----
work=$(mktemp -d) || exit 1
qemu=
cleanup() {
    [ -z "$qemu" ] || kill "$qemu" 2>/dev/null
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,tmp,etc/libibverbs.d,lib/modules,epx/tests,epx/lib}

add() { # files of this machine at their own path, with the libraries they need
    local file
    for file in "$@"; do
        file=$(realpath -s "$file")
        [ -e "$root$file" ] && continue
        install -D "$(realpath "$file")" "$root$file"
        while read -r file; do
            [ -e "$root$file" ] || install -D "$(realpath "$file")" "$root$file"
        done < <(ldd "$file" 2>/dev/null | sed -n 's/.*=> \(\/[^ ]*\).*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p')
    done
}
take() { # a program or library of the build, stripped: the guest's memory holds it all
    strip -o "$root/epx/$2/$(basename "$1")" "$1" || cp "$1" "$root/epx/$2/"
    while read -r file; do
        add "$file"
    done < <(ldd "$1" | sed -n 's/.*=> \(\/[^ ]*\).*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p')
}

cases=$here/cases.sh
[ $# -eq 0 ] || { cases=$1 && shift; }
programs=(conformance_test_net conformance_test_channel differential_test_ht "$@")
cp "$cases" "$root/epx/cases.sh" || exit 1
for program in "${programs[@]}"; do
    [ -x "$build/tests/$program" ] || { echo "$build/tests/$program is not built"; exit 1; }
    take "$build/tests/$program" tests
done
take "$build/lib/libepx_ofi.so" lib
cp "$(command -v busybox)" "$root/bin/busybox"
add "$(command -v ip)" "$(command -v rdma)" "$provider"
echo "driver rxe" >"$root/etc/libibverbs.d/rxe.driver"
cp "$here/init.sh" "$root/init" && chmod 755 "$root/init"
order=()
for module in "${modules[@]}"; do
    # modprobe says each module's file after those that it needs; nothing for what is built in.
    while read -r _ file _; do
        name=$(basename "$file")
        [ -e "$root/lib/modules/$name" ] && continue
        cp "$file" "$root/lib/modules/" && order+=("$name")
    done < <(modprobe -d "$cache/kernel" -S "$version" --show-depends "$module" 2>/dev/null | grep '^insmod')
done
printf '%s\n' "${order[@]}" >"$root/lib/modules/order"
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/initramfs" || exit 1

# ---- boot ----
echo "kernel $version, $((${#order[@]})) modules, initramfs of $(($(stat -c %s "$work/initramfs") >> 20)) MB"
timeout -k 5 "$seconds" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 1024 -display none -monitor none \
    -serial "file:$work/console" -net none -no-reboot -kernel "$kernel" -initrd "$work/initramfs" \
    -append "console=ttyS0 quiet panic=-1 oops=panic tsc=unstable epx_seconds=$((seconds - 20))" >"$work/qemu" 2>&1 &
qemu=$!
wait "$qemu"
rc=$?
qemu=
tr -d '\r' <"$work/console" | tee "$work/said" | sed -n '/^epx-rxe:/,$p'
[ "$rc" = 124 ] && echo "the guest did not finish in $seconds s"
if ! grep -q '^epx-rxe: device ' "$work/said"; then
    cat "$work/qemu"
    tail -40 "$work/said"
    echo "the guest did not come as far as a soft-RoCE device (qemu's exit code: $rc)"
    exit 1
fi
wrong=$(grep -c '^epx-rxe: FAILED' "$work/said")
right=$(grep -c '^epx-rxe: passed' "$work/said")
echo "$right passed, $wrong failed over verbs on soft-RoCE"
[ "$wrong" = 0 ] && [ "$right" -gt 0 ] && grep -q '^epx-rxe: done' "$work/said"
