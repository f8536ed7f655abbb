"""How a command ends: 0 done, 2 the user's mistake, 143 after SIGTERM, 1 anything else."""

import atexit
import logging
import os
import sys
from typing import NoReturn

DONE, FAILED, MISTAKE, TERMINATED = 0, 1, 2, 143

# Of the environment: the file that rank 0 makes at the end of a job, and the process (as JSON) that ranks die with.
DONE_MARK, LAUNCHER = "KTO_DIST_DONE_MARK", "KTO_DIST_LAUNCHER"
# The words of the command (as JSON), where they hold a password: a command line can be read by everybody.
WORDS = "KTO_DIST_WORDS"


class Stopped(RuntimeError):
    """A run ended before its last step: a signal, or a rule of `health`. A checkpoint was saved first."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def leave(status: int) -> NoReturn:
    """Ends this process without taking the interpreter down.

    Gloo's worker threads outlive `destroy_process_group` (DeepSpeed keeps groups of its own), and may hold the last
    collective's tensors. One that lets go of them while the interpreter goes down aborts the process, and a run that
    has succeeded would end with status 250.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
