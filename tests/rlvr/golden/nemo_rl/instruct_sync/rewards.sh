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
output=/WORK/instruct_sync
server=
umask 077
[ -s "$output/rewards.token" ] ||
    head -c 32 /dev/urandom | base64 | tr -d '\n' > "$output/rewards.token"
printf "http://%s:%s\n" "$(hostname -f)" 8400 > "$output/.rewards.url"
mv "$output/.rewards.url" "$output/rewards.url"
trap 'kill $server 2>/dev/null; rm -f "$output/rewards.url"' EXIT
trap 'exit 143' TERM INT
/PYTHON -m mellum2_megatron rl serve --host 0.0.0.0 --port 8400 --token-file "$output/rewards.token" &
server=$!
wait $server
