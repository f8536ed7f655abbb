"""Kahneman-Tversky Optimization of language models from thumbs feedback, distributed.

    from kto_dist import Config, train
    summary = train(Config.load("config.yaml"))

`train` runs on however many ranks the launcher started, or on one.
"""

import sys
import types
from typing import Any

from kto_dist.config import Config
from kto_dist.errors import UserError

__version__ = "0.1.0"
__all__ = ["Config", "UserError", "train"]


class _Package(types.ModuleType):
    # `train` is a function here and a module file beside: the import system would bind the module over the function
    # as soon as something imports it. Importing it lazily keeps `import kto_dist` free of torch.
    @property
    def train(self) -> Any:
        from kto_dist.train import train

        return train

    @train.setter
    def train(self, module: types.ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
