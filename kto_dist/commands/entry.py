"""What every rank runs: `python -m kto_dist.commands.entry train|precompute CONFIG [section.key=value ...]`, or
`evaluate RUN_OR_MODEL ...`.

Turns the outcome into the exit status that the launcher passes on: 0 done, 2 the user's mistake (said once a host),
143 stopped by a signal, 1 anything else.
"""

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from kto_dist.base import comm, processes, restart
from kto_dist.base.errors import RankError, UserError
from kto_dist.base.exits import DONE, DONE_MARK, FAILED, LAUNCHER, MISTAKE, Stopped, leave
from kto_dist.base.secrets import masked
from kto_dist.commands.words import request
from kto_dist.training.config import Config


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    # DeepSpeed's launcher adds --local_rank=N; the environment says the same
    job, *words = [word for word in arguments if not word.startswith("--local_rank")]
    restarts = None
    _stay_with_launcher()
    try:
        comm.init()
        restarts, again = restart.Restarts(), restart.order()
        if again is not None:
            words = [*words, f"{again.setting}={again.tokens}"]
        work = _work(job, words)
        quiet()
        try:
            work()
        except Stopped as stop:
            if comm.is_main():
                print(f"stopped: {stop}", file=sys.stderr, flush=True)
            comm.barrier()  # the launcher ends every rank as soon as one has left
            return stop.exit_code
        except RuntimeError as failure:
            if restarts is not None:
                _start_again(restarts, failure)
            raise
        _note_done()
    except UserError as mistake:
        alone = isinstance(mistake, RankError)
        if comm.local_rank() == 0 or alone:  # another host may lack a file that rank 0's has
            where = f"rank {comm.rank()}: " if alone and comm.world_size() > 1 else ""
            print(f"error: {where}{masked(str(mistake))}", file=sys.stderr, flush=True)
        return MISTAKE
    finally:
        comm.shutdown()
    return DONE


def _work(job: str, words: list[str]) -> Callable[[], object]:
    """What is going to be done; nothing that takes long is imported for it. Raises `UserError`."""
    if job == "evaluate":
        wanted = request(words)

        def evaluation() -> object:
            from kto_dist.training.evaluate import evaluate

            return evaluate(wanted)

        return evaluation
    config, *overrides = words
    settings = Config.load(config, overrides)

    def run() -> object:
        if job == "train":
            from kto_dist.training.loop import train

            return train(settings)
        from kto_dist.training.precompute import precompute

        return precompute(settings)

    return run


def _start_again(restarts: restart.Restarts, failure: RuntimeError) -> None:
    """Does not return where the job starts again: for this failure, or for another rank's, which caused it."""
    from kto_dist.model.memory import NeedsRestart

    if isinstance(failure, NeedsRestart):
        restarts.now(
            restart.Order(reason=str(failure), step=failure.step, setting=failure.setting, tokens=failure.tokens)
        )
    restarts.hold()


def _stay_with_launcher() -> None:
    """A launcher that is killed takes its ranks along: they would train on, and the next start would join them."""
    if "RANK" in os.environ:  # there is a launcher, and no shell that may leave its jobs behind
        processes.die_with_parent()
    if LAUNCHER in os.environ:
        processes.die_with(json.loads(os.environ[LAUNCHER]))


def _note_done() -> None:
    if comm.is_main() and DONE_MARK in os.environ:
        mark = Path(os.environ[DONE_MARK])
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            print(f"warning: {mark} cannot be written ({error}), so the launcher will take this job for unfinished")


def quiet() -> None:
    """Libraries report progress of their own on every rank; the run's own lines say what matters."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed|transformers)(\..*)?")
    if not comm.is_main():
        logging.disable(logging.WARNING)


def run_and_leave(arguments: list[str] | None = None, work: Callable[[list[str] | None], int] = main) -> NoReturn:
    """Runs `work` and ends this process with its status."""
    try:
        status = work(arguments)
    except Exception:
        print(masked(traceback.format_exc()), file=sys.stderr, flush=True)
        status = FAILED
    leave(status)


def usage(job: str) -> str:
    words = "CONFIG" if job != "evaluate" else "RUN_OR_MODEL [--data FILE] [--reference MODEL] [--against RUN_OR_MODEL]"
    return f"usage: deepspeed [--hostfile H] --module kto_dist.commands.{job} {words} [section.key=value ...]"


def script(job: str) -> None:
    """The body of `kto_dist.commands.<job>` and of `launch/<job>.py`."""
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(job), file=sys.stderr)
        sys.exit(0 if arguments else 2)
    run_and_leave([job, *arguments])


if __name__ == "__main__":
    run_and_leave()
