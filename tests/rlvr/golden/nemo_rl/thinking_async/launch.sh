#!/bin/bash
set -euo pipefail
cd /WORK/NeMo-RL
[ "$(git rev-parse HEAD)" = 7ea279abfbeb698b092856d0dab61e7cf39bc909 ] ||
    echo "warning: rendered for NeMo-RL 7ea279abf, this is another version" >&2
if ! grep -q '^import conversion.bridge' nemo_rl/models/megatron/community_import.py; then
    echo "error: Mellum 2 is not registered in this NeMo-RL. Fix: in $PWD run \
sed -i 's/^from megatron.bridge import AutoBridge\$/&\\nimport conversion.bridge/' \
nemo_rl/models/megatron/community_import.py" >&2
    exit 2
fi
export HF_HUB_OFFLINE=1
export PYTHONPATH=/CODE${PYTHONPATH:+:$PYTHONPATH}
export CONTAINER=/lustre/nemo-rl.sqsh
export MOUNTS=/:/
export COMMAND='uv run python -m mellum2_megatron.rlvr.nemo_rl.driver --config /WORK/thinking_async/grpo.yaml'
export GPUS_PER_NODE=8
export BASE_LOG_DIR=/WORK/thinking_async
rm -f "$BASE_LOG_DIR/rewards.url"
rewards=$(sbatch --parsable "$BASE_LOG_DIR/rewards.sh")
echo "rewards: job ${rewards%%;*}"
train=$(sbatch --parsable \
    --job-name=mellum2_12b_rlvr_thinking \
    --account=nlp \
    --partition=h200 \
    --time=1-00:00:00 \
    --nodes=20 \
    --exclusive \
    --gres=gpu:8 \
    --constraint='a b' \
    --dependency="after:${rewards%%;*}" \
    ray.sub)
echo "NeMo-RL: job ${train%%;*}"
sbatch --parsable \
    --job-name=mellum2_12b_rlvr_thinking-end \
    --account=nlp \
    --partition=h200 \
    --time=5 \
    --output=/dev/null \
    --dependency="afterany:${train%%;*}" \
    --wrap="scancel ${rewards%%;*}" > /dev/null
