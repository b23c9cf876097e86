#!/bin/bash
# README.md shows examples/hello.c as it is, and its command line builds it: check_readme.sh SOURCE_FOLDER BUILD_FOLDER
set -eu
cd "$1"
diff <(awk '/^```c$/ { on = 1; next } /^```$/ { on = 0 } on' README.md) examples/hello.c || {
    echo "README.md shows another examples/hello.c"
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
command=$(grep '^cc -Iinclude examples/hello.c' README.md)
[ -n "$command" ]
command=${command//build\/hello/$work\/hello}
command=${command//build\/lib/$2\/lib}
command=${command//\$PWD\/\//\/}
bash -c "$command"
