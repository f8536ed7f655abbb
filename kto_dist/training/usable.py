"""What a loss on pairs could use of a config's rows, before anything is trained: by every rule, and what it leaves."""

from dataclasses import dataclass
from typing import get_args

from kto_dist.base.errors import UserError
from kto_dist.data import tokenise
from kto_dist.data.config import Rule
from kto_dist.data.examples import load
from kto_dist.data.preference import Preferences, preferences
from kto_dist.model.loading import load_tokenizer
from kto_dist.training.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Usable:
    """One data set under one rule."""

    data: str
    """`data.train` or `data.heldout`."""
    rule: Rule
    found: Preferences


def usable_pairs(config: Config) -> list[Usable]:
    """On one rank, without a device or weights. Leaves the tokenised rows, for the run to find. Raises `UserError`."""
    if config.data.soft_labels:
        raise UserError(
            "data.soft_labels (true) gives an answer both labels, each by its probability, and a pair is of a good and "
            "a bad one: set it to false"
        )
    model = config.model
    tokenizer = load_tokenizer(model.path, model.gguf_file, trust_remote_code=model.trust_remote_code)
    folders = tokenise.prepare(config.data, tokenizer)
    given = zip(("data.train", "data.heldout"), folders, strict=True)
    examples = {name: load(folder) for name, folder in given if folder is not None}
    return [
        Usable(data=name, rule=rule, found=preferences(rows, rule))
        for name, rows in examples.items()
        for rule in get_args(Rule)
    ]
