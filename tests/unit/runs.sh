#!/bin/bash
# EPX_TEST_RUNS: cases whose ranks are threads and those that are processes together are all, nothing to run is skipped,
# and other words are refused: runs.sh PROGRAM_OF_TEST_LL
set -u
program=$1
failed=0
run() { # VALUE EXIT_CODE PART: sets checks
    local said rc=0
    said=$(EPX_TEST_RUNS=$1 "$program" "$3" 10 2>&1) || rc=$?
    checks=$(sed -n 's/^\([0-9]*\) checks passed, 0 failed$/\1/p' <<<"$said")
    [ "$rc" = "$2" ] && return
    printf 'FAILED: EPX_TEST_RUNS=%s %s: exit code %s, not %s\n%s\n' "$1" "$3" "$rc" "$2" "$said"
    failed=1
}
run "" 0 two && all=$checks
run threads 0 two && threads=$checks
run processes 0 two && processes=$checks
echo "checks: $threads of threads and $processes of processes, $all of all"
[ "$failed" = 0 ] && [ "$threads" -gt 0 ] && [ "$processes" -gt 0 ] && [ $((threads + processes)) = "$all" ] || failed=1
run threads 77 "two processes"
run processes 77 "two ranks"
run forks 2 two
run forks 2 "no such case"
exit $failed
