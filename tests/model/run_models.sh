#!/bin/bash
# Check a protocol's model: run_models.sh NAME.list, beside NAME.pml. Lines of the list: `right | flags` must have no
# error in the whole state space; `wrong | flags` is a broken twin and must have one. Each run has 2 GB and 300 s, two
# run at a time. MODEL_JOBS changes that.
set -u
list=$(realpath "$1")
model=${list%.list}.pml
command -v spin >/dev/null || {
    echo "skipped: spin is not installed (tools/setup.sh test installs it)"
    exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

one() { # NUMBER VERDICT FLAGS: one line of result in $work/NUMBER.said
    local number=$1 verdict=$2 folder=$work/$1 found start=$SECONDS
    shift 2
    mkdir "$folder" && cd "$folder" || return
    local search=-DSAFETY
    [[ $* == *-DLIVE* ]] && search=-DNXT
    if ! { spin -a "$@" "$model" && "${CC:-gcc}" -O1 -w $search -DVECTORSZ=4096 -DMEMLIM=2000 -DCOLLAPSE -o pan pan.c; } >log 2>&1; then
        tail -3 log
        found="broken: it does not compile"
    else
        timeout 300 ./pan -m400000 -w22 >log 2>&1
        local rc=$?
        if [ $rc = 124 ]; then
            found="undecided: more than 300 s"
        elif grep -qE '^pan:[0-9]+: (assertion|invalid end|acceptance|non-progress)|errors: [1-9]' log; then
            found=wrong
        elif grep -qE 'search depth too small|MEMLIM|out of memory|Search not completed|hash array full' log || ! grep -q 'errors: 0' log; then
            found="undecided: the search did not complete"
        else
            found=right
        fi
    fi
    local states why
    states=$(awk '/states, stored/ { print $1; exit }' log)
    why=$(grep -m1 '^pan:' log | grep -oE '(assertion violated|invalid end state).*' | cut -c1-60)
    [ "$found" = "$verdict" ] && word=ok || word=FAILED
    printf '%-6s %s, is %s (%s states, %d s)  %s  %s\n' $word "$verdict" "$found" "${states:-no}" $((SECONDS - start)) "$*" "$why" >"$work/$number.said"
    cd "$work" && rm -rf "$folder"
}

number=0
while IFS='|' read -r verdict flags; do
    verdict=${verdict// /}
    case $verdict in '' | '#'*) continue ;; esac
    number=$((number + 1))
    read -ra words <<<"$flags"
    while [ "$(jobs -rp | wc -l)" -ge "${MODEL_JOBS:-2}" ]; do wait -n; done
    one "$(printf %03d $number)" "$verdict" "${words[@]}" &
done <"$list"
wait
cat "$work"/*.said
good=$(grep -c '^ok' "$work"/*.said -h | awk '{ n += $1 } END { print n }')
echo "$(basename "$model"): $good of $number as expected"
[ "$good" = "$number" ] && [ "$number" -gt 0 ]
