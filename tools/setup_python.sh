#!/bin/bash
# Make .venv, the Python that the tests and examples run under: epx (this checkout's), torch, numpy, pytest.
#
# A torch (2.4 or newer) of the system's python3 is used. Otherwise torch comes from PyPI, once, into a virtual
# environment outside the checkout (EPX_PYTHON_CACHE, default ~/.cache/epx/venv): PyPI's torch for Linux is a CUDA build
# that does not load without NVIDIA's libraries, about 2.7 GB to download and 5 GB on disk, CPU or not.
#
# EPX_SETUP_TORCH=0 skips that. When torch cannot be had this says so and ends well: the Python tests then skip.
set -u
cd "$(dirname "$0")/.."
root=$PWD
export PIP_DEFAULT_TIMEOUT=${PIP_DEFAULT_TIMEOUT:-300} # pip waits 15 s, too short for a slow mirror and 800 MB
cache=${EPX_PYTHON_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/epx/venv}

say() { echo "setup_python.sh: $*"; }
has_all() { "$1" -c 'import sys, numpy, pytest, torch
sys.exit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 4))' 2>/dev/null; }
has_torch() { "$1" -c 'import sys, torch
sys.exit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 4))' 2>/dev/null; }
skip() {
    say "$* -- the Python tests will be skipped"
    exit 0
}

# Packages of other places, and of this checkout, seen from .venv.
link() {
    local site
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    { echo "$root/python"; [ $# -eq 0 ] || echo "$1"; } >"$site/epx_checkout.pth"
}

if [ -x .venv/bin/python ] && has_all .venv/bin/python; then
    [ -n "$(.venv/bin/python -c 'import epx; print(epx.__file__)' 2>/dev/null)" ] || link
    exit 0
fi
command -v python3 >/dev/null || skip "there is no python3"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' || skip "python3 is older than 3.9"

if has_torch python3; then
    say "using the torch of $(command -v python3)"
    python3 -m venv --clear --system-site-packages .venv || skip "python3 -m venv failed (apt-get install python3-venv)"
    link
    has_all .venv/bin/python || .venv/bin/python -m pip install -q numpy pytest || skip "numpy and pytest could not be installed"
    exit 0
fi

if [ ! -e "$cache/.complete" ]; then
    [ "${EPX_SETUP_TORCH:-1}" != 0 ] || skip "there is no torch, and EPX_SETUP_TORCH=0"
    mkdir -p "$(dirname "$cache")" || skip "cannot make $(dirname "$cache")"
    exec 9>"$cache.lock"
    flock 9 # another checkout may be at it
fi
if [ ! -e "$cache/.complete" ]; then
    # 2.4 is the oldest that epx works with, and the smallest download; newer Pythons need a newer one.
    torch=${EPX_TORCH:-$(python3 -c 'import sys; print("torch==2.4.1" if sys.version_info < (3, 13) else "torch")')}
    say "installing $torch from PyPI into $cache: about 2.7 GB to download, 5 GB on disk, several minutes, once"
    [ -x "$cache/bin/python" ] || python3 -m venv "$cache" || skip "python3 -m venv failed (apt-get install python3-venv)"
    "$cache/bin/python" -m pip install -q --no-compile --no-cache-dir "$torch" numpy pytest ||
        skip "pip could not install $torch"
    has_all "$cache/bin/python" || skip "$torch was installed but does not load"
    touch "$cache/.complete"
fi
"$cache/bin/python" -m venv --clear --without-pip .venv || skip "python3 -m venv failed"
link "$("$cache/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
has_all .venv/bin/python || skip "torch in $cache does not load"
say "made .venv with the torch in $cache"
