"""Rules that watch a run's metrics and say what to do; the loop asks after every step.

A rule looks at one step's metrics and keeps a count of the consecutive steps beyond its limit. It warns once when it
first acts; `stop` asks the loop to save a checkpoint and end the run.
"""

import math
from dataclasses import dataclass, field

from kto_dist.training.config import HealthConfig

# z0 at 0 for this many steps: the KL estimate is negative throughout, and the loss has lost its anchor.
CLAMPED_STEPS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    stop: bool
    message: str
    # the value, the rule, and what to try


@dataclass
class Monitor:
    limits: HealthConfig
    beyond: dict[str, int] = field(default_factory=dict)

    def check(self, step: int, metrics: dict[str, float]) -> list[Advice]:
        advice = []
        broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        if broken:
            advice.append(
                Advice(
                    stop=True,
                    message=f"step {step}: {', '.join(broken)} is not a finite number: lower train.lr, or use fp32",
                )
            )
        kl = metrics.get("kl_raw", 0.0)
        limit = self.limits.max_kl
        if self._for_a_while("max_kl", limit is not None and abs(kl) > limit, self.limits.patience):
            advice.append(
                Advice(
                    stop=self.limits.on_trouble == "stop",
                    message=f"step {step}: kl_raw ({kl:.1f} nats) has been beyond health.max_kl ({limit}) for "
                    f"{self.limits.patience} steps: the policy runs away from its reference; lower train.lr or raise "
                    "kto.beta, and look at the noise in the labels",
                )
            )
        if self._for_a_while("clamped", metrics.get("kl_clamped", 0.0) == 1.0, CLAMPED_STEPS):
            advice.append(
                Advice(
                    stop=False,
                    message=f"step {step}: kl_raw has been negative for {CLAMPED_STEPS} steps, so z0 sits at 0: "
                    "desirable rows are scored against the reference itself; a larger global batch, a lower train.lr "
                    "or apo_zero_unpaired (which has no z0) may suit this data better",
                )
            )
        return advice

    def _for_a_while(self, rule: str, beyond: bool, patience: int) -> bool:
        """True once, when the limit has been exceeded `patience` times in a row."""
        self.beyond[rule] = self.beyond.get(rule, 0) + 1 if beyond else 0
        return self.beyond[rule] == patience
