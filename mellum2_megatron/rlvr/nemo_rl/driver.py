"""Start of NeMo-RL's GRPO with this project's environment, inside NeMo-RL's own environment.

``python -m mellum2_megatron.rlvr.nemo_rl.driver --config grpo.yaml``, in a checkout of NeMo-RL.
"""

from __future__ import annotations

import runpy
import sys

from mellum2_megatron.rlvr.nemo_rl.environment import CLASS, NAME

SCRIPT = "examples/run_grpo.py"


def main() -> None:
    """Register the environment and run NeMo-RL's script with the words of the command line."""
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env

    ACTOR_ENVIRONMENT_REGISTRY[CLASS] = PY_EXECUTABLES.SYSTEM
    register_env(NAME, CLASS)
    sys.argv = [SCRIPT, *sys.argv[1:]]
    runpy.run_path(SCRIPT, run_name="__main__")


if __name__ == "__main__":
    main()
