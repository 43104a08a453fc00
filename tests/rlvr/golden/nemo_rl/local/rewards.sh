#!/bin/bash
export PYTHONPATH=/CODE${PYTHONPATH:+:$PYTHONPATH}
set -eu
cd /WORK/data/rlvr_instruct
umask 077
[ -s /WORK/local/rewards.token ] || head -c 32 /dev/urandom | base64 | tr -d '\n' > /WORK/local/rewards.token
printf "http://%s:%s\n" "127.0.0.1" 8400 > /WORK/local/.rewards.url
mv /WORK/local/.rewards.url /WORK/local/rewards.url
trap 'kill $server 2>/dev/null; rm -f /WORK/local/rewards.url' EXIT
trap 'exit 143' TERM INT
/PYTHON -m mellum2_megatron rl serve --host 127.0.0.1 --port 8400 --token-file /WORK/local/rewards.token &
server=$!
wait $server
