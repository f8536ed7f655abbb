"""The runs of a comparison: one for each method, learning rate and beta, each a config of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kto_dist.base.config import to_yaml
from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.comparison.config import ComparisonConfig
from kto_dist.objective.config import ObjectiveConfig
from kto_dist.objective.losses import LOSSES
from kto_dist.record.run_folder import RunFolder
from kto_dist.training.config import Config

_OF_COMPARISON = ("in_evaluate", "batch", "cache")
"""Settings of answers that no run's own answers follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """One run."""

    method: str
    lr: float
    beta: float | None
    """None for a loss without it."""
    config: Config

    @property
    def name(self) -> str:
        return Path(self.config.train.output).name

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.train.output))

    @property
    def file(self) -> Path:
        """Its config, which `kto-dist train` takes."""
        return self.folder.path.with_suffix(".yaml")

    @property
    def is_done(self) -> bool:
        """Raises `UserError` where another run lies in its place."""
        if not (self.folder.summary.exists() and self.folder.heldout_rows.exists()):
            return False
        if _of_run(self.folder.config.read_text(encoding="utf-8")) != _of_run(to_yaml(self.config)):
            raise UserError(
                f"{self.folder.path} holds a finished run with other settings: give another train.output, or delete it"
            )
        return True


def _of_run(config: str) -> Any:
    """The settings that a run comes of: more, or longer, answers for the judge are the comparison's own."""
    try:
        tree = yaml.safe_load(config)
        answers = tree.pop("answers")
    except (yaml.YAMLError, AttributeError, KeyError):
        return config
    if answers.get("while_training"):
        tree["answers"] = {name: value for name, value in answers.items() if name not in _OF_COMPARISON}
    return tree


def planned(config: ComparisonConfig) -> list[Planned]:
    """In the order of `compare.methods`, rates and betas."""
    found = []
    for method in config.compare.methods:
        betas: tuple[float | None, ...] = config.compare.beta or (config.objective.beta,)
        for lr in config.compare.lr or (config.train.lr,):
            for beta in betas if "beta" in LOSSES[method].settings else (None,):
                found.append(_planned(config, method, lr, beta))
    return found


def _planned(config: ComparisonConfig, method: str, lr: float, beta: float | None) -> Planned:
    name = f"{method}-lr{lr:g}" + ("" if beta is None else f"-beta{beta:g}")
    # the judge is the comparison's own: with another one nothing is run again
    tree = config.model_dump(mode="json", by_alias=True, exclude={"compare", "judge"})
    tree["objective"] = _objective(config.objective, method, beta)
    tree["train"] |= {"lr": lr, "output": str(Path(config.train.output) / name)}
    # the parent is registered by nobody, and children have names of their own
    tree["tracking"] |= {"run_name": f"{Path(config.train.output).name}/{name}", "register": None}
    return Planned(method=method, lr=lr, beta=beta, config=Config.build(tree))


def _objective(section: ObjectiveConfig, method: str, beta: float | None) -> dict[str, Any]:
    """The settings that the method uses; the others are the other methods'."""
    own = {name: getattr(section, name) for name in LOSSES[method].settings}
    return own | {"loss": method} | ({} if beta is None else {"beta": beta})


def write(runs: list[Planned]) -> None:
    """The configs, for `kto-dist train`."""
    for run in runs:
        run.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(run.file, to_yaml(run.config).encode())
