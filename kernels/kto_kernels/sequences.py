"""From the log-probs of tokens to each sequence's loss and slope, as soon as a chunk has completed its unit.

Two implementations of one contract: a few torch operations, and a Triton kernel that takes one launch a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kto_kernels.kto_loss import sequence_logps
from kto_kernels.losses import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What is known of S sequences before the forward."""

    loss: Loss
    ref_logps: Tensor
    """(S,)"""
    sign: Tensor
    """(S,) +1 or -1; once prepared the d of `losses`, which may be that over the sequence's tokens"""
    row_weight: Tensor
    """(S,)"""
    z0: Tensor
    """()"""
    beta: Tensor
    """()"""
    nll_weight: Tensor | None
    """(S,) weight of each sequence's -logp beside the loss; None: nothing"""
    other_weight: Tensor | None = None
    """(S,) weight of each sequence's loss with the other sign; None: nothing"""

    def prepare(self, sizes: Sequence[int], device: torch.device) -> "Sequences":
        def wide(tensor: Tensor) -> Tensor:
            # contiguous: the kernel reads the next sequence's from the next place
            return tensor.detach().to(device, torch.float64, non_blocking=True).contiguous()

        lengths = torch.tensor(sizes, dtype=torch.int64)
        starts = torch.zeros(len(sizes) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=starts[1:])
        sign = wide(self.sign)
        if self.loss.averaged:
            sign = self.loss.directions(sign, lengths.to(device, non_blocking=True))
        return Sequences(
            terms=Terms(
                loss=self.loss,
                ref_logps=wide(self.ref_logps),
                sign=sign,
                row_weight=wide(self.row_weight),
                z0=wide(self.z0),
                beta=wide(self.beta),
                nll_weight=None if self.nll_weight is None else wide(self.nll_weight),
                other_weight=None if self.other_weight is None else wide(self.other_weight),
            ),
            starts=starts,
            starts_there=(starts.pin_memory() if device.type == "cuda" else starts).to(device, non_blocking=True),
            logps=torch.zeros(len(sizes), dtype=torch.float64, device=device),
            losses=torch.zeros(len(sizes), dtype=torch.float64, device=device),
            slopes=torch.zeros(len(sizes), dtype=torch.float64, device=device),
            others=None if self.other_weight is None else torch.zeros(len(sizes), dtype=torch.float64, device=device),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """The same, and what has been found out so far; everything fp64 and on the hidden states' device."""

    terms: Terms
    starts: Tensor
    """(S + 1,) int64 on the CPU, the row where each sequence begins"""
    starts_there: Tensor
    """the same on the device"""
    logps: Tensor
    """(S,) filled in as sequences are completed"""
    losses: Tensor
    """(S,) likewise, unweighted"""
    slopes: Tensor
    """(S,) likewise: weight times minus dloss/dmargin of the unit; times its d it is the factor of d(-logp)"""
    others: Tensor | None
    """(S,) likewise, the loss with the other sign, where that has a weight"""

    def weighted_loss(self) -> Tensor:  # ()
        value = (self.terms.row_weight * self.losses).sum()
        if self.terms.other_weight is not None and self.others is not None:
            value = value + (self.terms.other_weight * self.others).sum()
        return value if self.terms.nll_weight is None else value - (self.terms.nll_weight * self.logps).sum()

    def piece_slope(self, first: int) -> Tensor:  # ()
        """Of the unit that begins with sequence `first`: times its d it is the factor of d(-logp).

        That of -logp itself is in it where the unit is one sequence; the two of a pair may differ in it.
        """
        if self.terms.nll_weight is None or self.terms.loss.unit > 1:
            return self.slopes[first]
        return self.slopes[first] + self.terms.nll_weight[first] / self.terms.sign[first]

    def piece_factor(self, rows: slice, scale: Tensor | None, dtype: torch.dtype) -> Tensor:  # (n,)
        """What is known of the factor of these rows' G before their unit is complete; the rest is `piece_slope`."""
        return self._by_row(self.terms.sign, rows, scale, dtype)

    def piece_nll(self, rows: slice, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:  # (n,)
        """What is added to it, and is no part of `piece_slope`; None: nothing."""
        if self.terms.nll_weight is None or self.terms.loss.unit == 1:
            return None
        return self._by_row(self.terms.nll_weight, rows, scale, dtype)

    def _by_row(self, values: Tensor, rows: slice, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        spread = torch.repeat_interleave(values, self.starts_there.diff(), output_size=int(self.starts[-1]))
        found = spread[rows].to(dtype)
        return found if scale is None else found * scale

    def sums(self, tokens: Tensor) -> Tensor:  # (N,) -> (S,) fp64
        return sequence_logps(tokens, self.starts.diff())


def sequence_pass(
    sequences: Sequences,
    first: int,
    last: int,
    token_logps: Tensor,  # (N,)
    scale: Tensor | None,  # (N,) what a row's G is still to be multiplied by; None: nothing
    row_slope: Tensor,  # (N,) of token_logps's dtype
    backend: str,
) -> None:
    """Fills `logps`, `losses` and `slopes` of sequences first..last-1, whose rows are all known, and `row_slope` of
    those rows: the sequence's slope times its sign, plus the weight of its -logp, times the row's scale."""
    terms, own = sequences.terms, slice(first, last)
    if backend == "triton":
        from kto_kernels.triton_sequences import sequence_pass as triton_sequence_pass

        triton_sequence_pass(
            terms.loss,
            token_logps,
            sequences.starts_there,
            (terms.ref_logps, terms.sign, terms.row_weight, terms.z0, terms.beta),
            terms.nll_weight,
            terms.other_weight,
            scale,
            (sequences.logps, sequences.losses, sequences.slopes, sequences.others),
            row_slope,
            first,
            last,
        )
        return
    lengths = sequences.starts[first : last + 1].diff()
    rows = slice(int(sequences.starts[first]), int(sequences.starts[last]))
    logps = sequence_logps(token_logps[rows], lengths)
    margins = terms.loss.margins(logps, terms.ref_logps[own], terms.sign[own], terms.z0)
    losses = terms.loss.curve.value(margins, terms.beta)
    slopes = terms.loss.by_unit(terms.row_weight[own]) * terms.loss.curve.slope(margins, losses, terms.beta)
    if terms.other_weight is not None:  # of units of one sequence
        assert sequences.others is not None
        others = terms.loss.curve.value(-margins, terms.beta)
        # its slope pulls the other way
        slopes = slopes - terms.other_weight[own] * terms.loss.curve.slope(-margins, others, terms.beta)
        sequences.others[own] = others
    losses, slopes = terms.loss.by_sequence(losses), terms.loss.by_sequence(slopes)
    sequences.logps[own], sequences.losses[own], sequences.slopes[own] = logps, losses, slopes
    signed = slopes * terms.sign[own]
    signed = signed if terms.nll_weight is None else signed + terms.nll_weight[own]
    of_rows = torch.repeat_interleave(signed, lengths.to(signed.device), output_size=rows.stop - rows.start)
    row_slope[rows] = of_rows if scale is None else of_rows * scale[rows]
