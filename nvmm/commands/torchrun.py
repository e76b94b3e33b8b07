"""torchrun, without its own trace where the ranks have said why they refuse: `nvmm torchrun`.

    nvmm torchrun --standalone --nproc-per-node 8 -m nvmm train experiment=NAME ...

The options are torchrun's. Plain torchrun works as well; it then follows the refusal of a config,
which a rank has printed in a line, by a trace of torchrun's code.
"""

from __future__ import annotations

import logging
import sys

from nvmm.config.compose import BAD_CONFIG, INTERRUPTED


def main() -> int:
    """Return the exit code of the ranks. An unexplained error keeps torch's trace."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    agent = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    agent.addFilter(_about_no_refusal)
    try:
        # torchrun's own `main` would write the same trace into a file and raise again.
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code != BAD_CONFIG:
            raise
        return code
    except SignalException as error:
        print(f"nvmm torchrun: ended by {error.sigval.name}", file=sys.stderr)
        return INTERRUPTED if error.sigval.name == "SIGINT" else 128 + int(error.sigval)
    return 0


def _about_no_refusal(record: logging.LogRecord) -> bool:
    """Return whether the agent's line tells more than that ranks ended with a refusal."""
    text = record.getMessage()
    return not (f"failed (exitcode: {BAD_CONFIG})" in text or "closing signal SIGTERM" in text)
