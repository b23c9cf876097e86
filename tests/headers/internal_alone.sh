#!/bin/bash
# Every internal header of the core compiles alone: run.sh CC SOURCE_FOLDER
cc=$1 top=$2 failed=0 count=0
while read -r header; do
    count=$((count + 1))
    "$cc" -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Wno-unused-function -Werror -fsyntax-only -I"$top/include" -I"$top/src" -x c "$header" || {
        echo "does not compile alone: $header"
        failed=$((failed + 1))
    }
done < <(find "$top/src" -name '*.h' -not -path '*/cuda/*' -not -path '*/ofi/*' | sort)
echo "$count headers, $failed failed"
[ "$failed" = 0 ] && [ "$count" -gt 0 ]
