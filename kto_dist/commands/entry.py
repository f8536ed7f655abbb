"""What every rank runs: `python -m kto_dist.commands.entry train|precompute CONFIG [section.key=value ...]`, or
`evaluate RUN_OR_MODEL ...`; and `worker CONFIG ...`, which is a rank alone.

Turns the outcome into the exit status that the launcher passes on: 0 done, 2 the user's mistake, 143 stopped by a
signal, 1 anything else. An error is said once a host; one that not all ranks have met comes with the rank's number.
Whoever has met it ends the others, wherever they wait, with the same status.
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
from kto_dist.base.agree import OthersFailed
from kto_dist.base.errors import UserError
from kto_dist.base.exits import DONE, DONE_MARK, FAILED, LAUNCHER, MISTAKE, WORDS, Stopped, leave
from kto_dist.base.secrets import masked
from kto_dist.base.signals import heed_sigterm_as_process_1
from kto_dist.commands.words import request
from kto_dist.training.config import Config

WORKER, ANY_DEVICE = "worker", "--any-device"


def work_of(job: str, words: list[str]) -> Callable[[], object]:
    """What is going to be done; nothing that takes long is imported for it. Raises `UserError`."""
    if job == "evaluate":
        wanted = request(words)

        def evaluation() -> object:
            from kto_dist.training.evaluate import evaluate

            return evaluate(wanted)

        return evaluation
    any_device = job == WORKER and ANY_DEVICE in words
    config, *overrides = [word for word in words if not (any_device and word == ANY_DEVICE)]
    settings = Config.load(config, overrides)

    def run() -> object:
        if job == "train":
            from kto_dist.training.loop import train

            return train(settings)
        from kto_dist.training import precompute

        if job == WORKER:
            from kto_dist.reference.worker import Working

            return precompute.work(settings, Working(any_device=any_device))
        return precompute.precompute(settings)

    return run


def main(
    arguments: list[str] | None = None, work_of: Callable[[str, list[str]], Callable[[], object]] = work_of
) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    # DeepSpeed's launcher adds --local_rank=N; the environment says the same
    job, *words = [word for word in arguments if not word.startswith("--local_rank")]
    words = json.loads(os.environ[WORDS])[1:] if WORDS in os.environ else words
    if job == WORKER:
        comm.stay_alone()
        heed_sigterm_as_process_1()
    else:
        _stay_with_launcher()
    try:
        try:
            comm.init()
        except UserError as mistake:
            if comm.local_rank() == 0:
                print(f"error: {mistake}", file=sys.stderr, flush=True)
            return MISTAKE
        restarts, again = restart.Restarts(), restart.order()
        if again is not None:
            words = [*words, *restart.overrides(again.settings)]
        try:
            work = work_of(job, words)
            quiet()
            work()
            _note_done()
        except Stopped as stop:
            if comm.is_main():
                print(f"stopped: {stop}", file=sys.stderr, flush=True)
            comm.barrier()  # the launcher ends every rank as soon as one has left
            return stop.exit_code
        except UserError as mistake:
            return _failed(restarts, f"error: {masked(str(mistake))}", MISTAKE)
        except Exception as failure:
            _hold(restarts, failure)
            if (cause := restarts.cause(failure)) is not None:
                restarts.say_cause(cause)
                restarts.end(FAILED)
                return FAILED
            return _failed(restarts, masked(traceback.format_exc()), FAILED)
    finally:
        comm.shutdown()
    return DONE


def _failed(restarts: restart.Restarts, text: str, status: int) -> int:
    """Tells of it, and ends the other ranks."""
    who = restarts.speaker(text)
    if who is not None:
        print(f"{who}{text}", file=sys.stderr, flush=True)
    restarts.end(status)
    return status


def _hold(restarts: restart.Restarts, failure: Exception) -> None:
    """Does not return where the job starts again, for this failure, or where another rank's has caused it."""
    from kto_dist.model.memory import NeedsRestart

    if isinstance(failure, NeedsRestart):
        restarts.now(restart.again(str(failure), failure.step, failure.settings))
    # a rank that has failed tells of it itself, and soon
    restarts.hold(seconds=10.0 if isinstance(failure, OthersFailed) else 0.0)


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
    # where peft imports it on a CPU it asks for a package that nothing here needs
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
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
