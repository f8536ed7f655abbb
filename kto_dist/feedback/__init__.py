"""From production thumbs to a training set that can be trusted.

    from kto_dist.feedback import MiningConfig, mine
    audit = mine(MiningConfig.load("mine.yaml"))

The log becomes clean, weighted, split Parquet that `kto-dist train` reads as it is, and a report to look at before.
No torch is needed. The functions are imported on first use, so that reading settings needs no database either.

May import: `record`, `base`. Open first: `mining.py`, the map of the wing.
"""

from typing import TYPE_CHECKING, Any

from kto_dist.feedback.config import MiningConfig

if TYPE_CHECKING:
    from kto_dist.feedback.mining import audit_log, mine, pipeline

__all__ = ["MiningConfig", "audit_log", "mine", "pipeline"]


def __getattr__(name: str) -> Any:
    if name in ("audit_log", "mine", "pipeline"):
        from kto_dist.feedback import mining

        return getattr(mining, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
