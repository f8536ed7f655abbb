"""Kahneman-Tversky Optimization of language models from thumbs feedback, distributed.

    from kto_dist import Config, train
    summary = train(Config.load("config.yaml"))

`train` runs on however many ranks the launcher started, or on one. It is imported on first use, so that
`import kto_dist` needs no torch.
"""

from typing import TYPE_CHECKING, Any

from kto_dist.base.errors import UserError
from kto_dist.training.config import Config

if TYPE_CHECKING:
    from kto_dist.training.loop import train

__version__ = "0.1.0"
__all__ = ["Config", "UserError", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from kto_dist.training.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
