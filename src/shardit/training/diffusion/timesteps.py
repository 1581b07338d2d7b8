"""Draws of timesteps: uniform, logit-normal or shifted. A draw is a share of the noise schedule, from 0 to 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from shardit.errors import InputError

NAMES = ("uniform", "logit-normal", "shifted")


@dataclass(frozen=True)
class Timesteps:
    """A distribution of the share of the schedule, by its quantile function.

    shift: of "shifted", for any size; None: from `dynamic`, by size. dynamic: the fields of a scheduler's
    configuration by which the shift depends on the number of tokens of an image.
    """

    kind: str
    shift: float | None = None
    dynamic: dict[str, Any] | None = None

    def quantile(self, share: float, tokens: int) -> float:
        """Return the value below which a `share` of the draws lie. tokens: those of a sample's image or clip."""
        if self.kind == "uniform":
            return share
        if self.kind == "logit-normal":
            return 1 / (1 + math.exp(-NormalDist().inv_cdf(share)))
        shift = self.shift_for(tokens)
        return shift * share / (1 + (shift - 1) * share)

    def shift_for(self, tokens: int) -> float:
        """Return the shift of samples with so many tokens."""
        if self.shift is not None or self.dynamic is None:
            return self.shift or 1.0
        low, high = (self.dynamic[f"{end}_image_seq_len"] for end in ("base", "max"))
        slope = (self.dynamic["max_shift"] - self.dynamic["base_shift"]) / (high - low)
        mu = self.dynamic["base_shift"] + slope * (tokens - low)
        return math.exp(mu) if self.dynamic["time_shift_type"] == "exponential" else mu

    def described(self) -> str:
        """Return a line for the user."""
        if self.kind != "shifted":
            return f"timesteps: {self.kind}"
        shift = "a shift that depends on the size" if self.shift is None else f"shift {self.shift:g}"
        return f"timesteps: uniform with {shift}"


def usual_kind(flow: bool, *, experts: bool, shift: float | None) -> str:
    """Return the distribution of a run that names none. Of logit-normal draws next to none are for the expert of much
    noise; that of the samples' schedule, which is shifted, has enough for both."""
    if not flow:
        return "uniform"
    return "shifted" if experts or shift is not None else "logit-normal"


def timesteps_for(kind: str, shift: float | None, scheduler: Any, flow: bool) -> Timesteps:
    """Return the distribution that the settings ask for. Raises InputError if it does not fit the scheduler.

    Only "shifted" uses a shift, that of the settings or else of the scheduler; nothing else shifts its draws again.
    """
    if kind not in NAMES:
        raise InputError(f"timesteps={kind!r} must be one of {', '.join(NAMES)}")
    if shift is not None and kind != "shifted":
        raise InputError(f"shift={shift:g} has no effect with timesteps={kind!r}: use timesteps='shifted'")
    if kind != "shifted":
        return Timesteps(kind)
    if not flow:
        raise InputError("timesteps='shifted' needs a flow-matching model: use 'uniform' or 'logit-normal'")
    config = scheduler.config
    if shift is None and config.get("use_dynamic_shifting"):
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        known = {name: config.get(name) or value for name, value in defaults.items()}
        return Timesteps(kind, dynamic={**known, "time_shift_type": config.get("time_shift_type", "exponential")})
    own = config.get("flow_shift", config.get("shift"))
    return Timesteps(kind, shift if shift is not None else float(own or 1.0))
