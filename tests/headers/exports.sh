#!/bin/bash
# libepx.so exports what the public headers declare with EPX_API, and nothing else: exports.sh LIBRARY INCLUDE_FOLDER
set -eu
library=$1 include=$2
declared=$(find "$include/epx" -name '*.h' -exec cat {} + | tr '\n' ' ' |
    grep -oE 'EPX_API [^;({]*\(' | grep -oE 'epx_[a-z0-9_]+ ?\($' | tr -d ' (' | sort -u)
exported=$(nm -D --defined-only "$library" | awk '$2 != "A" { print $3 }' | sed 's/@.*//' | sort -u)
undeclared=$(comm -13 <(echo "$declared") <(echo "$exported"))
missing=$(comm -23 <(echo "$declared") <(echo "$exported"))
[ -z "$undeclared" ] || printf 'exported, but not declared with EPX_API:\n%s\n' "$undeclared"
[ -z "$missing" ] || printf 'declared with EPX_API, but not exported:\n%s\n' "$missing"
echo "$(echo "$declared" | wc -l) declared, $(echo "$exported" | wc -l) exported"
[ -n "$declared" ] && [ -z "$undeclared$missing" ]
