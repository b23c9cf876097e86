#!/bin/bash
# examples/hello as a launcher would start it, three ranks: run_hello.sh PROGRAM
port=$((20000 + RANDOM % 20000)) failed=0
for rank in 0 1 2; do
    RANK=$rank WORLD_SIZE=3 LOCAL_RANK=$rank LOCAL_WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
        timeout 50 "$1" &
done
for job in $(jobs -p); do wait "$job" || failed=1; done
exit $failed
