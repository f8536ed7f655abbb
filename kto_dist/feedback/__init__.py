"""From production thumbs to a training set that can be trusted.

    from kto_dist.feedback import MiningConfig, mine
    audit = mine(MiningConfig.load("mine.yaml"))

The log becomes clean, weighted, split Parquet that `kto-dist train` reads as it is, and a report to look at before.
No torch is needed.

May import: `record`, `base`. Open first: `mine.py`, the map of the wing.
"""

from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.mine import mine, pipeline

__all__ = ["MiningConfig", "mine", "pipeline"]
