"""Looking before training: rows as they will be trained on, and all that is wrong without a device or weights.

In:  the config (`check`), or what was prepared (`preview`). Out: lines for people.
"""

import json
from pathlib import Path

import numpy as np

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.data.audited import describes_all, find_audits
from kto_dist.data.examples import Examples
from kto_dist.data.spelling import Speller
from kto_dist.store.fingerprint import weight_files
from kto_dist.training.config import Config
from kto_dist.training.prepare import Prepared, adapter_of, class_weights, counts, prepare
from kto_dist.training.run import find_checkpoint

SHORT, LONG = 300, 4000
"""Characters of a text: at the start of a run, and where somebody asked to look."""


def check(config: Config) -> None:
    """Everything before the reference and the policy, on one rank: no device is touched, and of weights is seen alone
    whether there are any.

    Leaves the tokenised rows, for the run to find. Raises `UserError`.
    """
    console = Console()
    for setting, source in (("model.path", config.model), ("reference.path", config.reference)):
        _find_weights(setting, source.path, source.gguf_file)
    found = find_checkpoint(config, console)
    audits = find_audits(config.data.train_paths, console.warn)
    adapter, rehearsed = adapter_of(config)
    prepared = prepare(config, console)
    if not describes_all(audits, config.data.train_paths):
        for doubt in prepared.train.report.doubts():
            console.warn(doubt)
    for line in preview(prepared, class_weights(prepared.train, config, console.warn), characters=LONG):
        console.say(line)
    if adapter is not None and rehearsed is not None:
        for line in rehearsed.lines(adapter):
            console.say(line)
    plan, heldout = prepared.plan, prepared.heldout
    start = "starts anew" if found is None else f"goes on from {found.name}"
    rows = counts(prepared.train)
    console.say(
        f"check: passed. {rows['desirable']:,} desirable and {rows['undesirable']:,} undesirable rows to train on, "
        f"{0 if heldout is None else len(heldout):,} held out; {plan.steps:,} steps of {plan.global_batch:,} rows. "
        f"the run in {config.train.output} {start}. Not looked at: what is in weight files, devices, other hosts"
    )


def _find_weights(setting: str, path: str | None, gguf_file: str | None) -> None:
    """Raises `UserError` for a folder without them. What lies on a hub is not fetched for a look."""
    if path is None or not Path(path).is_dir():
        return
    files = [Path(path) / gguf_file] if gguf_file else weight_files(Path(path))
    if lost := [file.name for file in files if not file.exists()]:
        raise UserError(f"{setting} ({path}) lacks {', '.join(lost)}, of its weights: fetch or copy the model again")


def preview(
    prepared: Prepared,
    weights: tuple[float, float],  # loss weights of the classes, as `class_weights` gives them
    rows: int = 3,
    characters: int = SHORT,
) -> list[str]:
    """A few training rows, cut and tokenised as the model gets them; `characters` of each text are shown."""
    examples, speller = prepared.train, Speller(prepared.tokenizer)
    names = [name for name, _ in prepared.config.data.train_sources]
    lines = []
    for row in _chosen(examples, rows):
        up, weight = float(examples.probability[row]), float(examples.weights[row])
        label = f"desirable by {up:g}" if 0 < up < 1 else "desirable" if up else "undesirable"
        asked, answered = _texts(examples, speller, row)
        times = up * weights[1] + (1 - up) * weights[0]
        tokens = f"{examples.prompt_lengths[row]:,} prompt + {examples.completion_lengths[row]:,} completion tokens"
        lines += [
            f"row {row + 1:,} of {len(examples):,}: {label}, weight {weight:g} "
            f"(times {times:g} of its class), {tokens}, from {names[examples.source[row]]}",
            f"  prompt:     {_short(asked, characters)}",
            f"  trained on: {_short(answered, characters)}",
        ]
    return lines


def _chosen(examples: Examples, rows: int) -> list[int]:
    """The first desirable row, the first undesirable one, and the first of the others."""
    chosen = [int(np.argmax(examples.desirable == up)) for up in (True, False)]
    others = [row for row in range(min(rows + 2, len(examples))) if row not in chosen]
    return [*chosen, *others][:rows]


def _texts(examples: Examples, speller: Speller, row: int) -> tuple[str, str]:
    """What the tokens of prompt and completion say, special ones included."""
    prompt, completion = examples.prompt(row).tolist(), examples.completion(row).tolist()
    # an answer decoded apart would lose a space at its start with some tokenizers
    asked, whole, apart = speller.decoded([prompt, prompt + completion, completion])
    return asked, whole[len(asked) :] if whole.startswith(asked) else apart


def _short(text: str, characters: int) -> str:
    """On one line, as JSON writes it. What is left out is left out in the middle: both ends say more."""
    if len(text) > characters:
        half = characters // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return json.dumps(text, ensure_ascii=False)
