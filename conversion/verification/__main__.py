"""`python -m conversion.verification FOLDER`: one rank that scores a checkpoint.

`mellum2 score` and `mellum2 verify` start it; the launcher names the rank in the
environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from mellum2_megatron.faults.failures import is_echo, report_failure
from mellum2_megatron.upstream import quiet_upstream

_ECHO_SECONDS = 5.0
"""Seconds to wait before exiting when this rank failed only because another did; the first cause is
then reported first."""


def main() -> int:
    """Run the job in the folder of the command line; report a failure to the launcher."""
    # Ctrl-C must end a rank at once: Python's own handler would wait for the running collective.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    quiet_upstream()
    try:
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            from mellum2_megatron import cpu

            cpu.activate()
        from conversion.verification.scoring import run_job

        run_job(Path(sys.argv[1]))
        import torch

        torch.distributed.destroy_process_group()
    except BaseException as error:
        code = report_failure(error, to_launcher=True, verbose=False)
        if is_echo(error):
            time.sleep(_ECHO_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: in sys.exit, threads and process groups may wait for lost ranks.
        os._exit(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
