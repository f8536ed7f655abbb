"""The end of a run: export, summary, report, artifacts."""

import json
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kto_dist.base import agree, comm, disks
from kto_dist.base.console import Console
from kto_dist.base.files import write_whole
from kto_dist.model.engines import Policy
from kto_dist.record.environment import environment_tags
from kto_dist.record.run_folder import RunFolder
from kto_dist.reference.logps import ReferenceLogps
from kto_dist.training import checkpoint
from kto_dist.training.best import Best
from kto_dist.training.card import model_card, say_outcome
from kto_dist.training.export import export
from kto_dist.training.heavy import NAMED, heavy_rows
from kto_dist.training.prepare import PreparedTraining, account, counts
from kto_dist.training.run import Goodbye, Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a loop leaves to be told."""

    steps: int
    """Done."""
    last: dict[str, Any]
    """The last step's line of metrics."""
    before: dict[str, Any] | None
    """Held-out figures before the first update."""
    after: dict[str, Any] | None
    """Held-out figures of the weights that are exported."""
    best: Best | None
    tokens: int
    """Of this process's steps."""
    memory: list[str]
    """What was said when it ran out."""


def finish(
    policy: Policy,
    weights: dict[str, Tensor] | None,  # to export; on rank 0
    prepared: PreparedTraining,
    refs: ReferenceLogps,
    run: Run,
    console: Console,
    outcome: Outcome,
    goodbye: Goodbye,
) -> dict[str, Any]:
    """Collective. Exports the weights, frees the policy, writes what rank 0 has to say. Returns the summary."""
    console.end()
    heavy = heavy_rows(prepared.plan, prepared.train, prepared.class_weights)
    summary = {
        "steps": outcome.steps,
        "training": outcome.last,
        "heldout": {"before": outcome.before, "after": outcome.after},
        "best": None if outcome.best is None else outcome.best.to_dict(),
        "data": {
            "train": {
                **account(prepared.train, [name for name, _ in prepared.config.data.train_sources]),
                "fingerprint": prepared.train.fingerprint,
            },
            "heldout": None if prepared.heldout is None else counts(prepared.heldout),
            "pairs": None if prepared.pairs is None else prepared.pairs.to_dict(),
            "audits": [audit.to_dict() for audit in run.audits],
            "class_weights": {"undesirable": prepared.class_weights[0], "desirable": prepared.class_weights[1]},
            "heavy_rows": {"count": len(heavy), "rows": [asdict(row) for row in heavy[:NAMED]]},
        },
        "reference": {
            "fingerprint": run.reference.digest,
            "pairs": refs.outcome.pairs,
            "from_store": refs.outcome.hits,
            "scored": refs.outcome.scored_once,
            "repeated": refs.outcome.repeated,
        },
        "weights": {
            "policy": prepared.weights.summary(),
            "reference": refs.weights.summary() if prepared.config.reference.path else None,
        },
        "world_size": comm.world_size(),
        "adapter": None if prepared.adapter is None else prepared.adapter.to_dict(),
        "precision": str(prepared.dtype).removeprefix("torch."),
        "attention": prepared.attention,
        "kernels": prepared.kernels,
        "packing": prepared.cutting.packed,
        "versions": environment_tags(),
        "resumed_from": run.state.step,
        "tokens": outcome.tokens,
        "memory": outcome.memory,
        "seconds": console.seconds,
        "export": str(run.folder.export),
        "mlflow": {"uri": run.tracker.uri, "run_id": run.tracker.run_id or run.mlflow_run},
    }
    policy.close()
    with disks.refusals("the export", "train.output", run.folder.path):
        agree.on_main(lambda: None if weights is None else _write(weights, prepared, run, summary, goodbye, console))
    if prepared.config.checkpoint.every_steps is None:  # there are those alone that this process was to go on from
        agree.once_per_host(lambda: checkpoint.remove(run.folder.path))
    say_outcome(summary, run.folder.path, console)
    return comm.broadcast(summary)


def report_so_far(prepared: PreparedTraining, run: Run, console: Console) -> None:
    """Of a run that its health has stopped; on rank 0. What cannot be written does not hide why it was stopped."""
    if not comm.is_main():
        return
    try:
        _report(prepared, run, console)
    except OSError as error:
        console.warn(f"the report of the stopped run cannot be written: {error}")


def _pages(folder: RunFolder, console: Console) -> list[Path]:
    """The report and its plots. Raises `OSError` alone: a page that cannot be drawn takes no trained model with it."""
    from kto_dist.record import report  # matplotlib: on rank 0, and at the end

    try:
        return [report.write_report(folder.path), folder.path / "plots"]
    except OSError:
        raise
    except Exception as error:
        traceback.print_exc()
        console.warn(
            f"there is no report: drawing it ended with {type(error).__name__}: {error} (the lines above say where). "
            f"All else of the run is whole; `kto-dist report {folder.path}` tries it again"
        )
        return []


def _report(prepared: PreparedTraining, run: Run, console: Console) -> None:
    """Rank 0. The page, where it is asked for; and to MLflow what people read of the folder. Raises `OSError`."""
    folder = run.folder
    files = [path for path in (folder.config, folder.summary, folder.health, folder.bad_rows) if path.exists()]
    if prepared.config.tracking.report:
        files += _pages(folder, console)
    for path in files:
        run.tracker.log_artifact(path)


def _write(
    weights: dict[str, Tensor],
    prepared: PreparedTraining,
    run: Run,
    summary: dict[str, Any],
    goodbye: Goodbye,
    console: Console,
) -> None:
    """Rank 0."""
    folder, tracking = run.folder, prepared.config.tracking
    _export(weights, prepared, folder, model_card(prepared.config, summary))
    write_whole(folder.summary, json.dumps(summary, indent=1).encode())
    goodbye.where = (
        f"when the model ({folder.export}) and {folder.summary.name} were written: the run is complete, but for its "
        "report and what MLflow was still to get"
    )
    run.tracker.tag(run.health_tags())
    _report(prepared, run, console)
    if prepared.adapter is not None and tracking.log_model:
        run.tracker.log_artifact(folder.export, "adapter")
    if (prepared.adapter is None or prepared.config.adapter.merged) and (tracking.log_model or tracking.register_as):
        run.tracker.log_model(folder.export if prepared.adapter is None else folder.merged)


def _export(weights: dict[str, Tensor], prepared: PreparedTraining, folder: RunFolder, card: str) -> None:
    """Rank 0. The model; or the adapter, and the model with it where that is asked for."""
    model = prepared.config.model
    if prepared.adapter is None:
        export(
            weights,
            folder.export,
            model_config=prepared.model_config,
            source=prepared.source,
            tokenizer=prepared.tokenizer,
            card=card,
            trust_remote_code=model.trust_remote_code,
        )
        return
    from kto_dist.training.adapter_export import export_adapter, export_merged

    export_adapter(
        weights,
        folder.export,
        adapter=prepared.adapter,
        model_config=prepared.model_config,
        tokenizer=prepared.tokenizer,
        card=card,
        trust_remote_code=model.trust_remote_code,
    )
    if prepared.config.adapter.merged:
        export_merged(
            folder.export,
            folder.merged,
            model=model,
            model_config=prepared.model_config,
            dtype=prepared.dtype,
            source=prepared.source,
            tokenizer=prepared.tokenizer,
            card=card,
        )
