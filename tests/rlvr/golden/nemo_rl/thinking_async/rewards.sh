#!/bin/bash
#SBATCH --job-name=mellum2_12b_rlvr_thinking-rewards
#SBATCH --account=nlp
#SBATCH --partition=h200
#SBATCH --time=1-00:00:00
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=/WORK/thinking_async/rewards-%j.log
#SBATCH --constraint="a b"
export HF_HUB_OFFLINE=1
export PYTHONPATH=/CODE${PYTHONPATH:+:$PYTHONPATH}
set -eu
cd /WORK/data/rlvr_thinking
umask 077
[ -s /WORK/thinking_async/rewards.token ] || head -c 32 /dev/urandom | base64 | tr -d '\n' > /WORK/thinking_async/rewards.token
printf "http://%s:%s\n" "$(hostname -f)" 8400 > /WORK/thinking_async/.rewards.url
mv /WORK/thinking_async/.rewards.url /WORK/thinking_async/rewards.url
trap 'kill $server 2>/dev/null; rm -f /WORK/thinking_async/rewards.url' EXIT
trap 'exit 143' TERM INT
/PYTHON -m mellum2_megatron rl serve --host 0.0.0.0 --port 8400 --token-file /WORK/thinking_async/rewards.token &
server=$!
wait $server
