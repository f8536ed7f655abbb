"""A model against its reference on held-out rows, outside of a run; and against another model on the same rows.

In:  `judged.Request`. Out: a JSON file, and the same as a dict.

Each model's log-probs are scored, or found in the store, as a reference's are: to the store a model is a model. So any
Hugging Face folder can be evaluated, one at a time in memory, sharded or offloaded as `reference.*` says, and evaluated
again without a forward.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_dist.base import agree, comm, disks
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.data import tokenise
from kto_dist.data.examples import Examples, load
from kto_dist.evaluation.figures import Evaluated, compare, findings
from kto_dist.evaluation.heldout import evaluate_rows
from kto_dist.evaluation.judges import judge_of
from kto_dist.evaluation.slices import sets_of, slices_of
from kto_dist.evaluation.table import answer_lines, lines_of
from kto_dist.model.loading import check_context, load_config, load_tokenizer
from kto_dist.objective.losses import LOSSES
from kto_dist.objective.taken import taken
from kto_dist.record.environment import environment_tags
from kto_dist.reference.logps import ReferenceLogps, score_reference
from kto_dist.reference.pairs import evaluation_pairs
from kto_dist.reference.setup import find_reference
from kto_dist.training.agreement import begin_together
from kto_dist.training.answered import Answered, Model, answered, unanswerable
from kto_dist.training.config import Config
from kto_dist.training.judged import Judged, Request, resolve
from kto_dist.training.prepare import counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(request: Request) -> dict[str, Any]:
    """Collective. Returns what the JSON file has. Raises `UserError` for what the user can fix."""
    comm.init()
    console = Console()
    judged = agree.together(lambda: resolve(request))
    config = judged.config
    begin_together("evaluate", config, words={name: str(value) for name, value in asdict(request).items()})
    examples = _rows(judged, console)

    # a judge that cannot be had is told before long work; rank 0 asks it
    judge = agree.together(lambda: judge_of(config.judge) if comm.is_main() else None)

    models = _models(judged)
    without = unanswerable(config, [*models])
    if without is not None:
        console.warn(without)
    setups: dict[str, Model] = {}
    scored: dict[str, ReferenceLogps] = {}
    for name, model in models.items():
        scored[name], setups[name] = _scored(config, name, model, examples, console)
    answers = None
    if without is None:
        answers = answered(config, setups, examples, models["model"].tokenizer, judge, console)
    console.end()
    return agree.on_main(lambda: _said(judged, models, scored, answers, examples, console))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """Where weights and tokenizer lie."""

    path: str
    gguf_file: str | None
    trust_remote_code: bool
    adapter: str | None
    """The folder of one that the model has."""

    @property
    def called(self) -> str:
        """For people."""
        return self.path if self.adapter is None else f"{self.adapter} on {self.path}"

    @property
    def vocabulary(self) -> dict[str, int]:
        found: dict[str, int] = self.tokenizer.get_vocab()
        return found

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.path, self.gguf_file, trust_remote_code=self.trust_remote_code)


def _models(judged: Judged) -> dict[str, _Model]:
    own, reference = judged.config.model, judged.config.reference
    found = {
        "reference": _Model(
            path=str(reference.path),
            gguf_file=reference.gguf_file,
            trust_remote_code=reference.trust_remote_code,
            adapter=judged.reference_adapter,
        ),
        "model": _Model(
            path=own.path,
            gguf_file=own.gguf_file,
            trust_remote_code=own.trust_remote_code,
            adapter=judged.adapter,
        ),
    }
    if (other := judged.against) is not None:
        found["against"] = _Model(
            path=other.path,
            gguf_file=other.gguf_file,
            trust_remote_code=own.trust_remote_code,
            adapter=other.adapter,
        )
    return found


def _rows(judged: Judged, console: Console) -> Examples:
    """Collective."""
    config = judged.config
    tokenizer = agree.together(lambda: _tokenizer(judged))
    console.phase("data")
    rows, apart = agree.once_per_host(lambda: tokenise.prepare(config.data, tokenizer))
    examples = load(rows if apart is None else apart)
    agree.same_everywhere(examples.fingerprint, "what the rows give as tokens", "copy rows and tokenizer to each again")
    for line in examples.report.lines(judged.sets):
        console.say(f"held-out: {line}")
    for line in examples.report.noticed():
        console.warn(line)
    if not len(examples):
        raise UserError("no row is left to evaluate on")
    return examples


def _tokenizer(judged: Judged) -> "PreTrainedTokenizerBase":
    """The model's. Raises `UserError` where another model would read its tokens as other words, or has no positions
    for the longest rows."""
    models = _models(judged)
    tokenizer = models["model"].tokenizer
    for name, model in models.items():
        config = load_config(model.path, model.gguf_file, name, trust_remote_code=model.trust_remote_code)
        check_context(config, judged.config.data.max_length)
        if model.vocabulary != tokenizer.get_vocab():
            raise UserError(
                f"{name} ({model.path}) has another vocabulary than {models['model'].path}: log-probs of the same "
                "tokens are compared, so both need the same tokenizer"
            )
    return tokenizer


def _scored(
    config: Config, name: str, model: _Model, examples: Examples, console: Console
) -> tuple[ReferenceLogps, Model]:
    """Collective. A model's log-probs of all rows and their KL pairs, by the settings of `reference`."""
    own = asdict(model)
    adapter = own.pop("adapter")
    section = config.reference.model_copy(update=own)
    role = {"reference": "the reference", "model": "the model", "against": "the other model"}[name]
    pairs = evaluation_pairs(config.train.seed, examples, with_z0=LOSSES[config.objective.loss].has_z0)
    console.say(f"{role.removeprefix('the ')}: {model.called}")
    setup, fingerprint = find_reference(
        section,
        config.model,
        max_length=config.data.max_length,
        prompt_limit=config.data.prompt_limit,
        console=console,
        adapter=None if adapter is None else Path(adapter),
        role=role,
    )
    return score_reference([pairs], setup, fingerprint, console), Model(setup=setup, digest=fingerprint.digest)


def _said(
    judged: Judged,
    models: dict[str, _Model],
    scored: dict[str, ReferenceLogps],
    answers: Answered | None,
    examples: Examples,
    console: Console,
) -> dict[str, Any]:
    """Rank 0. Figures, file and table."""
    config, section = judged.config, judged.config.objective
    units, _ = taken(LOSSES[section.loss], examples, section.pairs)

    def under(name: str) -> Evaluated:
        return evaluate_rows(
            scored[name].train,
            scored["reference"].train,
            examples,
            seed=config.train.seed,
            loss=LOSSES[section.loss],
            beta=section.beta,
            label_smoothing=section.label_smoothing,
            sft_weight=section.sft_weight,
            units=units,
            class_weights=judged.weights,
        )

    sources = judged.sets or [name for name, _ in config.data.train_sources]
    sets, slices = sets_of(examples, judged.sets), slices_of(examples, sources)
    rows = under("model")
    found = findings(rows, sets=sets, slices=slices)
    said: dict[str, Any] = {
        **{name: _about(model, scored[name]) for name, model in models.items()},
        "data": {**counts(examples), "fingerprint": examples.fingerprint, "sets": list(judged.sets)},
        "loss": section.loss,
        "beta": section.beta,
        "class_weights": {"undesirable": judged.weights[0], "desirable": judged.weights[1]},
        "heldout": found.to_dict(),
        "versions": environment_tags(),
    }
    other = paired = None
    if judged.against is not None:
        rows_there = under("against")
        other, paired = findings(rows_there, sets=sets, slices=slices), compare(rows, rows_there)
        said["heldout_against"] = other.to_dict()
        said["difference"] = {name: asdict(interval) for name, interval in paired.items()}
    if answers is not None:
        said["answers"] = answers.to_dict()
    with disks.refusals("the evaluation", "--output", judged.output.parent):
        judged.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(judged.output, json.dumps(said, indent=1).encode())
    lines = lines_of(found, judged.sets, other, paired)
    if answers is not None:
        lines += ["", *answer_lines(answers.figures, [*answers.answers], answers.contests, answers.on_policy)]
    for line in lines:
        console.say(line)
    console.say(f"evaluation: {judged.output}")
    return said


def _about(model: _Model, scored: ReferenceLogps) -> dict[str, Any]:
    pairs, hits = scored.outcome.pairs, scored.outcome.hits
    said: dict[str, Any] = {"path": model.path, "fingerprint": scored.fingerprint.digest}
    if model.adapter is not None:
        said["adapter"] = model.adapter
    return {**said, "from_store": hits, "scored": pairs - hits}
