#!/bin/sh
# .ci/count.py on results made by hand: what it counts, what it names, what it refuses.
#     test_count.sh SOURCE_FOLDER
set -u
SOURCE=$1
command -v python3 >/dev/null || { echo "there is no python3"; exit 77; }
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
PASSED=0 FAILED=0

cat >"$DIR/results.xml" <<'XML'
<testsuite>
  <testcase name="unit/good" status="run"><system-out>fine</system-out></testcase>
  <testcase name="unit/bad" status="fail"><failure message=""/><system-out>1 wrong</system-out></testcase>
  <testcase name="tools/on_gpu" status="notrun"><skipped/><system-out>some lines
skipped: no GPU</system-out></testcase>
  <testcase name="tools/other" status="notrun"><skipped/><system-out>skipped: no GPU</system-out></testcase>
  <testcase name="tools/on_gpu_too" status="notrun"><skipped/><system-out>skipped: rainy day</system-out></testcase>
  <testcase name="unit/absent" status="disabled"></testcase>
</testsuite>
XML
cat >"$DIR/skips" <<'END_SKIPS'
# both sides hold alternatives
tools/.*(cuda|gpu).* | GPU|CUDA
END_SKIPS

expect() { # WHAT, LINE: one whole line of the last output
    if grep -qxF -e "$2" "$DIR/out"; then
        PASSED=$((PASSED + 1))
    else
        echo "FAILED: $1: \"$2\" expected in"
        sed 's/^/    | /' "$DIR/out"
        FAILED=$((FAILED + 1))
    fi
}

python3 "$SOURCE/.ci/count.py" "$DIR/results.xml" "$DIR/skips" >"$DIR/out" 2>&1
expect "the sum" "counts 1 4 1"
expect "an expected skip" "skipped tools/on_gpu: skipped: no GPU"
expect "a skip not listed" "FAILED tools/other: a skip that nobody expected: skipped: no GPU"
expect "a skip for another reason" "FAILED tools/on_gpu_too: a skip that nobody expected: skipped: rainy day"
expect "a failure" "FAILED unit/bad"
expect "a test that was not run" "FAILED unit/absent: it was not run"

echo "no bar here" >"$DIR/broken"
if python3 "$SOURCE/.ci/count.py" "$DIR/results.xml" "$DIR/broken" >"$DIR/out" 2>&1; then
    echo "FAILED: a line without a bar was taken"
    FAILED=$((FAILED + 1))
fi
expect "a line without a bar" "$DIR/broken:1: \"NAME | REASON\" expected, not \"no bar here\""
python3 "$SOURCE/.ci/count.py" "$DIR/results.xml" "$SOURCE/.ci/expected-skips" >"$DIR/out" 2>&1
expect "the project's own list can be read" "counts 1 4 1"

echo "$PASSED passed, $FAILED failed"
[ "$FAILED" = 0 ]
