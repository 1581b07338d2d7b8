"""What `shardit serve` was asked for, checked, as plain data that the processes hand on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shardit.config import DiffusionParallelConfig
from shardit.diffusion.loading.model_options import ModelOptions
from shardit.loading.dtypes import Setting


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most; checked before anything is decoded."""

    body_bytes: int = 64 * 1024**2
    """Size of a request, uploads included."""
    pixels: int = 4096 * 4096
    """Width x height of a result, and of each input picture."""
    frames: int = 1000
    """Frames of a video."""
    steps: int = 200
    """Denoising steps."""
    outputs: int = 10
    """Results of one request."""
    input_images: int = 16
    """Input pictures of one request."""
    prompt_tokens: int = 4096
    """Tokens to which a prompt may be padded (`max_sequence_length`)."""
    prompt_chars: int = 32_000
    """Characters of a prompt."""
    jobs_per_key: int | None = None
    """Open jobs of one API key; None: no limit of its own."""


@dataclass(frozen=True)
class ServeOptions:
    """All that a server is started with."""

    model: str
    data_dir: Path
    config: DiffusionParallelConfig = field(default_factory=DiffusionParallelConfig)
    dtype: Setting = None
    device: str | None = None
    attention_backend: str | None = None
    loading: ModelOptions = field(default_factory=ModelOptions)
    host: str = "127.0.0.1"
    port: int = 8091
    served_model_name: str | None = None
    api_key_hashes: tuple[str, ...] = ()
    """As `keys.digest` makes them; none: everybody may use the server."""
    max_in_flight: int | None = None
    """Requests that one copy of the model runs at the same time; None: as many as are of use and fit the memory."""
    queue_size: int = 128
    """Jobs that may wait; more are answered with 429."""
    step_timeout_s: float = 600.0
    """Longest time without a step at a size that has not run before, in seconds."""
    limits: Limits = field(default_factory=Limits)
    keep_days: float = 30.0
    """Age at which ended jobs are forgotten."""
    keep_bytes: int = 50 * 1024**3
    """Size of all jobs' files at which the oldest are forgotten."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may use the server from a browser; none by default."""
    fetch_hosts: tuple[str, ...] = ()
    """Hosts from which input pictures may be fetched by URL; none by default."""
    executor: Literal["local", "ray"] = "local"
    """Who places the ranks; under torchrun it is torchrun."""
    num_nodes: int = 1
    """Machines that Ray spreads the ranks over."""

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self.served_model_name or self.model
