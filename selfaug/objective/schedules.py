"""How a term's weight changes during the training.

The fixed ones are functions of the step. The adaptive ones watch the training and hold something constant: KLTarget
the KL (or the drift), GradientBalance the ratio of the two parts' gradients. Their state is a few numbers, which
checkpoints keep, so that a resumed run goes on as if it had not been stopped.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from selfaug.errors import UserError


@dataclass(frozen=True)
class Observed:
    """What is known after an optimiser step.

    penalty: the term's mean over its rows, unweighted (nats, for a KL). drift: KL(base || tuned) on held-out text in
    nats per token, where it has just been measured. nll_norm, term_norm: norms of the gradients of the NLL and of the
    unweighted term, where they were asked for.
    """

    penalty: float | None
    drift: float | None = None
    nll_norm: float | None = None
    term_norm: float | None = None


class AlphaSchedule(Protocol):
    """Gives alpha for every step; sees what came of it."""

    adaptive: bool
    """Whether it multiplies what it started from: it cannot start from 0."""

    def alpha(self, start: float, step: int, steps: int) -> float:
        """The weight in step 0 <= step < steps, where `start` is the term's own."""
        ...

    def wants_gradients(self, step: int) -> bool:
        """Whether `observe` needs the norms of this step."""
        ...

    def observe(self, start: float, seen: Observed) -> None:
        """After each optimiser step."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def check_alpha(alpha: float, schedule: AlphaSchedule | None) -> None:
    """Raise UserError unless `schedule` can start from `alpha`."""
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha)) or alpha < 0:
        raise UserError(f"alignment.alpha={alpha} is not allowed: set it to 0 or a positive number.")
    if alpha == 0 and schedule is not None and schedule.adaptive:
        raise UserError(
            "alignment.alpha=0 stays 0 under an adaptive alignment/schedule: set alignment.alpha to a positive number."
        )


class _Fixed:
    """A function of the step: nothing to observe, nothing to keep."""

    adaptive = False

    def wants_gradients(self, step: int) -> bool:
        return False

    def observe(self, start: float, seen: Observed) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Constant(_Fixed):
    """alpha."""

    def alpha(self, start: float, step: int, steps: int) -> float:
        return start


@dataclass
class Linear(_Fixed):
    """From alpha in the first step to `end` in the last one, along a line."""

    end: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("end", self.end)

    def alpha(self, start: float, step: int, steps: int) -> float:
        return start + (self.end - start) * _progress(step, steps)


@dataclass
class Cosine(_Fixed):
    """From alpha in the first step to `end` in the last one, along half a cosine."""

    end: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("end", self.end)

    def alpha(self, start: float, step: int, steps: int) -> float:
        return self.end + (start - self.end) * (1 + math.cos(math.pi * _progress(step, steps))) / 2


@dataclass
class WarmupDecay(_Fixed):
    """From 0 to alpha over `warmup_ratio` of the steps, then to `end` along half a cosine."""

    warmup_ratio: float = 0.1
    end: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("end", self.end)
        if not (isinstance(self.warmup_ratio, (int, float)) and 0 <= self.warmup_ratio < 1):
            raise UserError(
                f"alignment.schedule.warmup_ratio={self.warmup_ratio} is not allowed: set it to a number in [0, 1)."
            )

    def alpha(self, start: float, step: int, steps: int) -> float:
        warmup = round(self.warmup_ratio * steps)
        if step < warmup:
            return start * step / warmup
        return Cosine(self.end).alpha(start, step - warmup, steps - warmup)


class _Adaptive:
    """Remembers alpha, once it has changed it."""

    adaptive = True
    least: float
    most: float
    now: float | None = None

    def alpha(self, start: float, step: int, steps: int) -> float:
        return start if self.now is None else self.now

    def wants_gradients(self, step: int) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = state["now"]

    def _set(self, alpha: float) -> None:
        self.now = min(max(alpha, self.least), self.most)


@dataclass
class KLTarget(_Adaptive):
    """Holds the term's KL, or the drift, at `target`: the controller of Ziegler et al. 2019 (arXiv 1909.08593, 2.2).

        error = clip(measured / target - 1, -clip, clip)        alpha <- alpha * (1 + gain * error)

    gain and clip are larger than theirs (0.1 and 0.2): they had thousands of steps to find alpha in.

    Args:
        target: nats per row of the KL, or per token of the drift.
        signal: kl (of each step's own batch) or drift (on held-out text, as often as callbacks=retention_probe
            measures it).
        gain, clip: how fast alpha moves: at most by the factor 1 + gain * clip for each measurement.
        least, most: alpha stays between them.
    """

    target: float = 0.05
    signal: Literal["kl", "drift"] = "kl"
    gain: float = 0.5
    clip: float = 0.5
    least: float = 1e-3
    most: float = 100.0

    def __post_init__(self) -> None:
        for name in ("target", "gain", "clip", "least", "most"):
            _positive(name, getattr(self, name))
        if self.signal not in ("kl", "drift"):
            raise UserError(f"alignment.schedule.signal={self.signal} is unknown: set it to kl or drift.")
        _ordered(self.least, self.most)
        if self.gain * self.clip >= 1:
            raise UserError(
                "alignment.schedule.gain times clip must be below 1, or alpha could become negative: lower one of them."
            )

    def observe(self, start: float, seen: Observed) -> None:
        measured = seen.penalty if self.signal == "kl" else seen.drift
        if measured is None:
            return
        error = min(max(measured / self.target - 1, -self.clip), self.clip)
        self._set(self.alpha(start, 0, 1) * (1 + self.gain * error))


@dataclass
class GradientBalance(_Adaptive):
    """Holds |alpha * gradient of the term| at `ratio` times |gradient of the NLL|.

    The norms are over all trained weights. They cost one more backward pass, so they are taken every `every` steps
    only, and alpha moves towards what they ask for on a logarithmic scale:

        log alpha <- smoothing * log alpha + (1 - smoothing) * log(ratio * |nll| / |term|)

    Not in the first two steps: until the weights have moved (with a warm-up the first step's learning rate is 0) tuned
    and base model are equal, and the term has no gradient but rounding.

    Args:
        ratio: 1 gives both parts gradients of one size.
        every: steps between two measurements.
        smoothing: in [0, 1).
        least, most: alpha stays between them.
    """

    ratio: float = 1.0
    every: int = 5
    smoothing: float = 0.5
    least: float = 1e-3
    most: float = 100.0

    def __post_init__(self) -> None:
        for name in ("ratio", "least", "most"):
            _positive(name, getattr(self, name))
        _ordered(self.least, self.most)
        if not isinstance(self.every, int) or self.every < 1:
            raise UserError(f"alignment.schedule.every={self.every} is not allowed: set it to a whole number above 0.")
        if not (isinstance(self.smoothing, (int, float)) and 0 <= self.smoothing < 1):
            raise UserError(
                f"alignment.schedule.smoothing={self.smoothing} is not allowed: set it to a number in [0, 1)."
            )

    def wants_gradients(self, step: int) -> bool:
        return step >= 2 and (step - 2) % self.every == 0

    def observe(self, start: float, seen: Observed) -> None:
        if not seen.nll_norm or not seen.term_norm:
            return
        wanted = self.ratio * seen.nll_norm / seen.term_norm
        self._set(self.alpha(start, 0, 1) ** self.smoothing * wanted ** (1 - self.smoothing))


def _progress(step: int, steps: int) -> float:
    """0 in the first step, 1 in the last one."""
    return min(step / max(steps - 1, 1), 1.0)


def _not_negative(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value)) or value < 0:
        raise UserError(f"alignment.schedule.{name}={value} is not allowed: set it to 0 or a positive number.")


def _ordered(least: float, most: float) -> None:
    if least > most:
        raise UserError(
            f"alignment.schedule.least={least} is above alignment.schedule.most={most}: lower one, or raise the other."
        )


def _positive(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value)) or value <= 0:
        raise UserError(f"alignment.schedule.{name}={value} is not allowed: set it to a positive number.")
