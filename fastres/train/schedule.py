"""The learning rate as a function of the step, so that the step is all that a checkpoint needs to store."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then a cosine to zero or steps down.

    Args:
        kind: "cosine" (Loshchilov and Hutter, "SGDR", 2017, equation 5, one period) or "step".
        peak: the learning rate at the end of the warm-up.
        steps: of the whole run.
        warmup: steps in which the rate climbs by peak/warmup each, reaching the peak with the last one.
        milestones: for "step", fractions of the run after which the rate is multiplied by `gamma`.
    """

    kind: str
    peak: float
    steps: int
    warmup: int = 0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    def __call__(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "step":
            return self.peak * self.gamma ** sum(step >= fraction * self.steps for fraction in self.milestones)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
