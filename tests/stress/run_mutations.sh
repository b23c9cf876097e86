#!/bin/bash
# Each broken rule must be noticed: run_mutations.sh BUILD_FOLDER, a build made with -DEPX_MUTATIONS=ON.
# mutations.txt says which program looks at which rule. A program that hangs past its time has noticed nothing: the
# library's own deadline must end it. On a machine that has other work too, that time is longer (tests/common/slowness.h).
set -u
build=$1
here=$(cd "$(dirname "$0")" && pwd)
source=$(cd "$here/../.." && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
caught=0 missed=0 rules=0
declare -A sound

stretched() { # SECONDS
    awk -v seconds="$1" -v cores="$(nproc)" '{
        split($4, threads, "/")
        most = ($1 > threads[1] ? $1 : threads[1]) / cores
        printf "%.0f\n", seconds * (most > 1 ? most : 1) }' /proc/loadavg
}

run() { # MUTATION SECONDS COMMAND...
    local mutation=$1 seconds
    seconds=$(stretched "$2")
    shift 2
    (cd "$build/tests" && EPX_MUTATION=$mutation EPX_TIMEOUT_MS=3000 timeout -k 5 "$seconds" "$@") >"$log" 2>&1 </dev/null
}

while IFS='|' read -r name seconds program; do
    name=${name// /} seconds=${seconds// /}
    case $name in '' | '#'*) continue ;; esac
    read -ra command <<<"$program"
    command[0]=./${command[0]}
    rules=$((rules + 1))
    grep -rqE "EPX__MUTATE\($name\)" "$source/src" || {
        echo "MISSED $name: no EPX__MUTATE($name) in src/"
        missed=$((missed + 1))
        continue
    }
    if [ -z "${sound[$program]:-}" ]; then
        run none "$seconds" "${command[@]}"
        rc=$?
        [ $rc = 0 ] || { # it is judged as the tests are, which a busy machine may spoil once
            tail -5 "$log"
            echo "$program fails (exit $rc) with no rule broken: once more"
            run none "$seconds" "${command[@]}"
            rc=$?
        }
        [ $rc = 0 ] || {
            tail -5 "$log"
            echo "MISSED $name: $program fails (exit $rc) twice with no rule broken"
            missed=$((missed + 1))
            continue
        }
        sound[$program]=yes
    fi
    start=$SECONDS
    for try in 1 2 3 4 5; do # a race needs its moment: five chances to be noticed
        run "$name" "$seconds" "${command[@]}"
        rc=$?
        [ $rc = 0 ] || break
    done
    case $rc in
    0 | 77)
        echo "MISSED $name: $program passes with the rule broken, $try times (exit $rc)"
        missed=$((missed + 1))
        ;;
    124 | 137)
        echo "MISSED $name: $program was still running after its time ($seconds s where the machine is free)"
        missed=$((missed + 1))
        ;;
    *)
        echo "caught $name in $((SECONDS - start)) s (exit $rc): $(grep -v '^$' "$log" | head -1 | cut -c1-120)"
        caught=$((caught + 1))
        ;;
    esac
done <"$here/mutations.txt"
echo "$caught rules caught, $missed missed"
[ "$missed" = 0 ] && [ "$rules" -gt 0 ]
