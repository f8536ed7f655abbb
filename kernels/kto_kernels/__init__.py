"""KTO's arithmetic on hidden states: LM head, log-softmax gather, sequence sums and the loss.

Depends on torch, and on triton where there is one, and knows nothing of ranks, datasets or trainers, so any trainer
can use it.
"""

from kto_kernels.head import HeadOutput, kto_head
from kto_kernels.kto_loss import kto_loss, sequence_lengths, sequence_logps
from kto_kernels.losses import LOSSES, SATURATED_SLOPE, Loss
from kto_kernels.token_logps import token_logps
from kto_kernels.transform import LogitTransform

__all__ = [
    "LOSSES",
    "SATURATED_SLOPE",
    "HeadOutput",
    "LogitTransform",
    "Loss",
    "kto_head",
    "kto_loss",
    "sequence_lengths",
    "sequence_logps",
    "token_logps",
]
