#!/bin/bash
export PYTHONPATH=/CODE${PYTHONPATH:+:$PYTHONPATH}
set -eu
cd /WORK/data/rlvr_instruct
output=/WORK/local
server=
umask 077
[ -s "$output/rewards.token" ] ||
    head -c 32 /dev/urandom | base64 | tr -d '\n' > "$output/rewards.token"
printf "http://%s:%s\n" "127.0.0.1" 8400 > "$output/.rewards.url"
mv "$output/.rewards.url" "$output/rewards.url"
trap 'kill $server 2>/dev/null; rm -f "$output/rewards.url"' EXIT
trap 'exit 143' TERM INT
/PYTHON -m mellum2_megatron rl serve --host 127.0.0.1 --port 8400 --token-file "$output/rewards.token" &
server=$!
wait $server
