"""The sampling that the generation configuration of a model recommends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Names of sampling parameters that generation configurations have, too."""

LEFT_OUT = (
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "penalty_alpha", "guidance_scale", "watermarking_config"),
    *("num_beams", "min_length", "min_new_tokens", "exponential_decay_length_penalty", "stop_strings", "dola_layers"),
    "max_time",
)
"""Values of generation configurations that change texts, and that continuous batches do not apply."""


def left_out(own: Mapping[str, Any]) -> list[str]:
    """Return a note on values of a generation configuration that are not applied, if there are any. own: those that
    are no defaults."""
    names = [name for name in LEFT_OUT if own.get(name) is not None]
    return [f"generation_config.json asks for {', '.join(names)}, which is not applied"] if names else []


def recommended(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `SamplingParams` from the values of a generation configuration."""
    chosen = {name: own[name] for name in DEFAULTS if own.get(name) is not None}
    return chosen if own.get("do_sample") else {**chosen, "temperature": 0.0}
