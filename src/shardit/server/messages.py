"""Messages between the API process and the supervisor, over a channel (`engine/process/channel.py`).

Jobs themselves are in the store, which both open: a message announces a change in the store, or carries data not worth
storing (progress). A lost message loses no job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shardit.diffusion.request.model_info import ModelInfo
from shardit.language.info import LanguageInfo

RanksState = Literal["loading", "ready", "restarting", "failed", "stopping"]

# From the API process to the supervisor.


@dataclass(frozen=True)
class Wake:
    """The store has a new job, or one that is to be cancelled."""


@dataclass(frozen=True)
class Scrape:
    """Asks for `Measured`."""


@dataclass(frozen=True)
class Pong:
    """The event loop is running."""


# From the supervisor to the API process.


@dataclass(frozen=True)
class Ping:
    """Asks for `Pong`."""


@dataclass(frozen=True)
class Ranks:
    """State of the ranks, sent at every change and when an API process starts.

    info: facts about the model from the first rank, once it is loaded. ranks: per rank {"rank", "state", "peak_bytes"}.
    restarts: number of restarts since the server started.
    """

    state: RanksState
    reason: str = ""
    info: ModelInfo | LanguageInfo | None = None
    ranks: tuple[dict[str, Any], ...] = ()
    restarts: int = 0


@dataclass(frozen=True)
class Changed:
    """The stored state of a job has changed."""

    job_id: str


@dataclass(frozen=True)
class StepDone:
    """A job in progress has finished `step` of `total` denoising steps; phase: encode, denoise or decode."""

    job_id: str
    step: int
    total: int
    phase: Literal["encode", "denoise", "decode"]
    seconds_per_step: float | None = None


@dataclass(frozen=True)
class Tokens:
    """New tokens of a text job: for each of its texts one or None. Unlike steps, none is ever left out. logprobs: for
    each text, log probabilities of some tokens by their ids, None if they were not requested."""

    job_id: str
    made: tuple[int | None, ...]
    logprobs: tuple[dict[int, float] | None, ...] | None = None


@dataclass(frozen=True)
class StepTokens:
    """The tokens of all texts of a batch in one step: one message in place of one for each."""

    of: tuple[Tokens, ...]


@dataclass(frozen=True)
class Measured:
    """The supervisor's metrics, in prometheus' text format."""

    text: bytes
