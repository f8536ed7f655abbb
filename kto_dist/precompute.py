"""Fills the reference store for a config and trains nothing: for other nodes than the policy's, or the night before."""

from kto_dist import comm
from kto_dist.config import Config
from kto_dist.console import Console
from kto_dist.prepare import prepare, score_reference
from kto_dist.reference import Outcome


def precompute(config: Config) -> Outcome:
    """Collective. Raises `UserError`."""
    comm.init()
    console = Console()
    return score_reference(prepare(config, console), console).outcome
