# How tests/gpu/all.sh runs things: steps, each under a limit of its own, in sections, each with its share of the time;
# a row of the table for each step, whatever becomes of it; logs gathered in few files. Sourced.
#
# The caller sets: source, build, logs (a file a step), out (what is kept: a log a lane, table.txt, failures.txt),
# deadline (in SECONDS), scale (percent: of limits and iterations).

lane=main
section=-
section_end=0

# row NAME VERDICT SECONDS TEXT: into the table, and said at once
row() {
    local line
    line=$(printf '%-9s %-20s %-13s %4s  %s' "$section" "$1" "$2" "$3" "${4:0:100}")
    printf '%s\n' "$line" >>"$out/table.txt"
    printf '%s\n' "${line:0:120}"
}

begin_section() { # NAME SECONDS
    section=$1
    section_end=$((SECONDS + $2 * scale / 100))
    [ "$section_end" -le "$deadline" ] || section_end=$deadline
}

pct() { # a number of iterations or percent, as much of it as there is time for
    local n=$(($1 * scale / 100))
    echo $((n > 0 ? n : 1))
}

# What a step's row says: key figures where they are known, else the last line.
key_text() { # LOG
    local bench errors
    bench=$(awk '/^  [a-z_]+ +[0-9]/ { printf "%s %s us p99 %s floor %s%s; ", $1, $4, $5, $8, $10 ? " " $10 " WRONG" : "" }' "$1")
    errors=$(grep -cE 'ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: [1-9]' "$1")
    if [ -n "$bench" ]; then
        echo "$bench"
    elif grep -q COMPUTE-SANITIZER "$1"; then
        echo "$errors processes with errors; $(grep 'checks passed' "$1" | tail -1)"
    else
        grep -av '^ *$' "$1" | tail -1 | sed -E 's/=+ ?//g; s/ +/ /g'
    fi
}

say_failure() { # NAME VERDICT LOG
    local lines
    lines=$(grep -avE ' 0 wrong |^ *$|PASSED|^=+ COMPUTE-SANITIZER' "$3" | head -40 | cut -c1-400)
    # The last line tells the last case that ended: one that crashed or hung says nothing.
    printf -- '---- %s/%s: %s; last: %s\n%s\n' "$section" "$1" "$2" "$(key_text "$3" | cut -c1-200)" "$lines" >>"$out/failures.txt"
    head -5 <<<"$lines" | cut -c1-180 | sed 's/^/    /'
}

# step NAME SECONDS COMMAND...: its output in a log. All that it starts is one process group, killed when it is late.
step() {
    local name=$1 limit=$(($2 * scale / 100)) left=$((section_end - SECONDS)) start=$SECONDS log rc verdict
    log=$logs/$section-$name.log
    shift 2
    if [ "$left" -lt 3 ] || [ $((left * 2)) -lt "$limit" ]; then # limits are twice what is expected, or more
        row "$name" "no time" 0 "$((left > 0 ? left : 0)) s left"
        return
    fi
    [ "$limit" -le "$left" ] || limit=$left
    if ! command -v "$1" >/dev/null; then
        touch "$logs/failed"
        row "$name" absent 0 "there is no ${1#"$source/"}"
        return
    fi
    timeout -k 3 "$limit" "$@" >"$log" 2>&1 </dev/null &
    echo $! >"$logs/$lane.pid"
    { wait $!; } 2>/dev/null
    rc=$?
    kill -KILL -- "-$!" 2>/dev/null # what outlived its parent: timeout's group has its number
    rm -f "$logs/$lane.pid"
    case $rc in
    0) verdict=passed ;;
    77) verdict=skipped ;;
    124 | 137) verdict="late: $limit s" ;;
    *) verdict="FAILED ($rc)" ;;
    esac
    { printf '==== %s/%s: %s, %d s: %s\n' "$section" "$name" "$verdict" $((SECONDS - start)) "$*"
        head -c 200000 "$log"; } >>"$out/log-$lane.txt"
    row "$name" "$verdict" $((SECONDS - start)) "$(key_text "$log")"
    case $rc in
    0 | 77) ;;
    *) touch "$logs/failed"
        say_failure "$name" "$verdict" "$log" ;;
    esac
}

# The slowest rank of each shape of gpu_test_ll_graph: NAME|MICROSECONDS
ll_slowest() { # LOG
    [ -e "$1" ] || return
    sed -n 's/^rank [0-9]* of [0-9]*: \(.*[a-z0-9]\)  *\([0-9.]*\) us.*/\1|\2/p' "$1" | sed 's/ *|/|/' |
        awk -F'|' '{ if ($2 > most[$1]) most[$1] = $2; if (!($1 in at)) { at[$1] = ++n; name[n] = $1 } }
                   END { for (i = 1; i <= n; i++) printf "%s|%s\n", name[i], most[name[i]] }'
}

# Both ways that low latency's rows arrive, side by side, with the goals for 2 and for 4 GPUs.
ll_table() { # RANKS, then logs: with flags, in-band, in-band on 96 blocks
    local ranks=$1
    { ll_slowest "$2" | sed 's/^/f|/'
        ll_slowest "$3" | sed 's/^/i|/'
        ll_slowest "$4" | sed 's/^/s|/'; } | awk -F'|' -v ranks="$ranks" '
        function less(way) {
            return value[way, pair] == "" ? "" : sprintf("%.2f", value[way, pair] - value[way, "fp8 dispatch"])
        }
        { if (!($2 in at)) { at[$2] = ++n; name[n] = $2 }; value[$1, $2] = $3 }
        END {
            if (!n) exit
            pair = "fp8 pair, combine"
            split(ranks == 2 ? "12 15 0 40 25 0" : "17 23 0 56 38 0", goals, " ")
            printf "low latency, us a call, slowest of %d ranks, 24 calls in a replayed graph\n", ranks
            printf "%-26s %8s %8s %10s %6s\n", "", "flags", "in-band", "96 blocks", "goal"
            for (i = 1; i <= n; i++) {
                s = name[i]
                printf "%-26s %8s %8s %10s %6s\n", s, value["f", s], value["i", s], value["s", s], goals[i] ? goals[i] : ""
            }
            printf "%-26s %8s %8s %10s %6s\n", "combine (pair - dispatch)", less("f"), less("i"), less("s"), ranks == 2 ? 29 : 41
        }'
}
