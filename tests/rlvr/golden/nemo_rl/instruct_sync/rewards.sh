#!/bin/bash
#SBATCH --job-name=mellum2_12b_rlvr_instruct-rewards
#SBATCH --account=nlp
#SBATCH --partition=h200
#SBATCH --time=1-00:00:00
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=/WORK/instruct_sync/rewards-%j.log
#SBATCH --constraint="a b"
export HF_HUB_OFFLINE=1
export PYTHONPATH=/CODE${PYTHONPATH:+:$PYTHONPATH}
set -eu
cd /WORK/data/rlvr_instruct
umask 077
[ -s /WORK/instruct_sync/rewards.token ] || head -c 32 /dev/urandom | base64 | tr -d '\n' > /WORK/instruct_sync/rewards.token
printf "http://%s:%s\n" "$(hostname -f)" 8400 > /WORK/instruct_sync/.rewards.url
mv /WORK/instruct_sync/.rewards.url /WORK/instruct_sync/rewards.url
trap 'kill $server 2>/dev/null; rm -f /WORK/instruct_sync/rewards.url' EXIT
trap 'exit 143' TERM INT
/PYTHON -m mellum2_megatron rl serve --host 0.0.0.0 --port 8400 --token-file /WORK/instruct_sync/rewards.token &
server=$!
wait $server
