"""Held-out rows as a run leaves them: what another process needs to compare models on the same rows.

In:  `Evaluated`. Out: a file; read again as `Evaluated` at beta 1 without z0, so that rewards are log-ratios in nats
and losses with another beta, or none, can be set side by side.
"""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kto_dist.base.files import write_whole
from kto_dist.evaluation.figures import Evaluated
from kto_dist.objective import metrics

_COLUMNS = ("logps", "ref_logps", "tokens")


def write(path: Path, rows: Evaluated) -> None:
    buffer = io.BytesIO()
    logps, ref_logps, tokens = (rows.column(name).numpy() for name in _COLUMNS)
    np.savez(buffer, logps=logps, ref_logps=ref_logps, tokens=tokens, sign=rows.sign.numpy(), prompts=rows.prompts)
    write_whole(path, buffer.getvalue())


def read(path: Path) -> Evaluated:
    """Raises `OSError`, `ValueError` or `KeyError` for a file that is not whole."""
    with np.load(path, allow_pickle=False) as found:
        return of(**{name: found[name] for name in (*_COLUMNS, "sign", "prompts")})


def of(
    *,
    logps: np.ndarray,  # (S,)
    ref_logps: np.ndarray,  # (S,)
    tokens: np.ndarray,  # (S,)
    sign: np.ndarray,  # (S,)
    prompts: np.ndarray,  # (S,)
) -> Evaluated:
    signs, policy = torch.from_numpy(sign), torch.from_numpy(logps)
    table = metrics.row_table(
        losses=torch.zeros_like(policy),
        weight=torch.ones_like(policy),
        logps=policy,
        ref_logps=torch.from_numpy(ref_logps),
        sign=signs,
        z0=torch.zeros((), dtype=torch.float64),
        beta=1.0,
        tokens=torch.from_numpy(tokens),
    )
    return Evaluated(
        table=table,
        sign=signs,
        prompts=prompts,
        kl=torch.zeros(0, dtype=torch.float64),
        kl_rows=np.zeros(0, np.int64),
        beta=1.0,
        counted=np.zeros(len(sign), bool),
    )


def only(rows: Evaluated, chosen: np.ndarray) -> Evaluated:  # (S,) bool
    """Some of the rows, with the pairs among them; rows as `of` makes them."""
    place = np.cumsum(chosen) - 1
    pairs = rows.pairs[chosen[rows.pairs].all(1)]
    found = of(
        **{name: rows.column(name).numpy()[chosen] for name in _COLUMNS},
        sign=rows.sign.numpy()[chosen],
        prompts=rows.prompts[chosen],
    )
    return paired(found, place[pairs])


def paired(rows: Evaluated, pairs: np.ndarray) -> Evaluated:  # (P, 2)
    """The same with these pairs of chosen and rejected rows."""
    return replace(rows, pairs=pairs, pair_losses=torch.zeros(len(pairs), dtype=torch.float64))
