"""`python -m mellum2_megatron.training RUN.yaml --device cpu`: one rank; torchrun starts it."""

from __future__ import annotations

import sys

from mellum2_megatron.training.rank_main import main

if __name__ == "__main__":
    sys.exit(main())
