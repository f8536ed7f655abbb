"""KTO's arithmetic on hidden states: LM head, log-softmax gather, sequence sums and the loss.

Depends on torch alone, and knows nothing of ranks, datasets or trainers, so any trainer can use it.
"""

from kto_kernels.head import token_logps
from kto_kernels.kto_loss import LOSSES, kto_loss, sequence_logps
from kto_kernels.transform import LogitTransform

__all__ = ["LOSSES", "LogitTransform", "kto_loss", "sequence_logps", "token_logps"]
