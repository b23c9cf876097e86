#!/bin/bash
# Install into a fresh prefix; build and run a consumer by pkg-config and by find_package: run.sh CMAKE BUILD CC
set -eu
cmake=$1 build=$2 cc=$3
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$cmake" --install "$build" --prefix "$work/first" >/dev/null
mv "$work/first" "$work/moved" # what was installed may be moved
prefix=$work/moved
library=$(dirname "$(find "$prefix" -name libepx.so)")
if command -v pkg-config >/dev/null; then
    export PKG_CONFIG_PATH=$library/pkgconfig
    # shellcheck disable=SC2046
    "$cc" -Wall -Werror "$here/consumer.c" -o "$work/by_pkg_config" $(pkg-config --cflags --libs epx)
    LD_LIBRARY_PATH=$library "$work/by_pkg_config"
else
    echo "pkg-config is not installed: only find_package is tried"
fi
"$cmake" -S "$here" -B "$work/build" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_C_COMPILER="$cc" >/dev/null
"$cmake" --build "$work/build" >/dev/null
"$work/build/consumer"
if [ -x "$prefix/bin/epx" ]; then
    "$prefix/bin/epx" info >/dev/null && echo "installed epx info runs"
fi
echo "install: all right"
