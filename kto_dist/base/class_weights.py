"""The paper's rule for the loss weights of the two classes (Eq. 8 of arXiv 2402.01306).

w_D n_D / (w_U n_U) should lie in [1, 3/2], where n_D and n_U are the summed row weights of thumbs up and thumbs down.
"""

from typing import Literal

BALANCE = (1.0, 1.5)


def class_weights(
    desirable: float,  # summed row weights of thumbs up, above 0
    undesirable: float,  # likewise of thumbs down
    *,
    up: Literal["auto"] | float = "auto",
    down: Literal["auto"] | float = "auto",
) -> tuple[float, float]:
    """(undesirable, desirable) loss weights; `auto` moves the ratio to the nearest end of the paper's range.

    With both on auto, the rarer class is raised and the other stays at 1, so that no row counts for less than it would
    without weights.
    """
    ratio, (low, high) = desirable / undesirable, BALANCE
    wanted = min(max(ratio, low), high)
    if isinstance(up, str):
        if isinstance(down, str):
            return max(1.0, ratio / high), max(1.0, low / ratio)
        return float(down), down * wanted / ratio
    if isinstance(down, str):
        return up * ratio / wanted, float(up)
    return float(down), float(up)
