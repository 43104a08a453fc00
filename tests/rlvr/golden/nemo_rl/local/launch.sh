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
export PYTHONPATH=/CODE${PYTHONPATH:+:$PYTHONPATH}
output=/WORK/local
rm -f "$output/rewards.url"
bash "$output/rewards.sh" &
rewards=$!
trap 'kill $rewards 2>/dev/null; wait $rewards || true' EXIT
uv run python -m mellum2_megatron.rlvr.nemo_rl.driver --config /WORK/local/grpo.yaml
