"""Whether a family's own code runs as it is asked to: told in one sentence, before anything is scored or trained."""

import traceback
from pathlib import Path

import numpy as np
import torch

from kto_dist.base.errors import UserError
from kto_dist.data.batch import collate
from kto_dist.model.causal_lm import Forward, ScoringModel, score
from kto_dist.model.loading import one_line
from kto_dist.model.memory import is_out_of_memory

_FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
    ImportError,
)


@torch.no_grad()
def check_runs(forward: Forward, model: ScoringModel, device: torch.device) -> None:
    """Collective where weights are sharded. A few tokens through the model. Raises `UserError` where it fails."""
    lm = model.lm
    few = min(8, lm.config.get_text_config().vocab_size)
    batch = collate([(np.arange(few // 2), np.arange(few // 2, few))], np.zeros(1, np.int64), packed=False).to(device)
    try:
        score(forward, batch, lambda hidden, weight, bias: hidden[:1] @ weight[:1].T)
    except _FAILURES as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        dtype = str(next(lm.parameters()).dtype).removeprefix("torch.")
        raise UserError(
            f"{type(lm).__name__} does not run in {dtype} with attention {lm.config._attn_implementation}: "
            f"{type(error).__name__}: {one_line(error)} ({Path(last.filename).name}, line {last.lineno}); try dtype "
            "fp32 (train.dtype, reference.dtype), attention eager (model.attention), model.kernels none, or another "
            "version of transformers"
        ) from error
