"""The checked options of `shardit serve`, as plain data for all processes."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import MISSING, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

from shardit.config import DiffusionParallelConfig
from shardit.diffusion.request.result_limits import ResultLimits
from shardit.engine.process.messages import TASK
from shardit.errors import InputError
from shardit.language.options import LanguageOptions
from shardit.loading.dtypes import Setting
from shardit.settings.checks import NAME, number, whole
from shardit.settings.declare import Flag, declare
from shardit.settings.model_options import ModelOptions, described

LANGUAGE = "shardit.engine.tasks.language"
"""The task of causal language models; TASK is that of pipelines."""


class Executor(Enum):
    """Values of --executor."""

    local = "local"
    ray = "ray"


@dataclass(frozen=True)
class RequestLimits(ResultLimits):
    """Upper limits of a request; checked before anything is decoded."""

    body_bytes: int = 64 * 1024**2
    """Size of a request, uploads included."""
    pixels: int = declare(
        4096 * 4096, "Maximum width x height of a result or input image.", whole(1), flag=Flag("max_pixels")
    )
    frames: int = declare(1000, "Maximum number of frames of a video.", whole(1), flag=Flag("max_frames"))
    steps: int = declare(200, "Maximum number of denoising steps.", whole(1), flag=Flag("max_steps"))
    outputs: int = 10
    """Results of one request."""
    input_images: int = 16
    """Input images of one request."""
    prompt_tokens: int = 4096
    """Tokens to which a prompt may be padded (`max_sequence_length`)."""
    prompt_chars: int = 32_000
    """Characters of a prompt."""
    jobs_per_key: int | None = declare(
        None, "Maximum number of unfinished jobs per API key. [default: no limit]", whole(1)
    )


DATABASE = "jobs.sqlite"
"""The file of the jobs in a data folder."""

_POSITIVE = number(above=0, maximum=1e6)


@dataclass(frozen=True)
class ServeOptions:
    """All options of a server."""

    model: str
    data_dir: Path = declare(
        MISSING,
        "Folder for jobs and results. [default: one per model in ~/.local/share]",
        flag=Flag(kind=Path | None, envvar="SHARDIT_DATA_DIR"),
    )
    config: DiffusionParallelConfig = field(default_factory=DiffusionParallelConfig)
    dtype: Setting = None
    device: str | None = None
    attention_backend: str | None = None
    loading: ModelOptions = field(default_factory=ModelOptions)
    task: str = TASK
    """The kind of model, as in `SessionSpec`."""
    language: LanguageOptions = field(default_factory=LanguageOptions)
    host: str = declare(
        "127.0.0.1", "Address to listen on; 0.0.0.0 for all interfaces.", NAME, flag=Flag(envvar="SHARDIT_HOST")
    )
    port: int = declare(8091, "TCP port; 0 selects a free one.", whole(0, 65535), flag=Flag(envvar="SHARDIT_PORT"))
    served_model_name: str | None = declare(None, "The model's name for clients. [default: MODEL]", NAME)
    api_key_hashes: tuple[str, ...] = ()
    """Digests by `keys.digest`; none: no key is required."""
    max_in_flight: int | None = declare(None, "Requests in flight per replica. [default: automatic]", whole(1))
    """Automatic: as many as help and fit the memory."""
    queue_size: int = declare(128, "Maximum number of waiting jobs; further requests get status 429.", whole(1))
    step_timeout_s: float = declare(
        600.0,
        "Timeout for a step at a size that has not run before, in seconds.",
        _POSITIVE,
        flag=Flag("step_timeout"),
    )
    limits: RequestLimits = field(default_factory=RequestLimits)
    keep_days: float = declare(30.0, "Days after which finished jobs are deleted.", _POSITIVE)
    keep_bytes: int = declare(
        50 * 1024**3,
        "Total size of files in GiB above which the oldest finished jobs are deleted.",
        _POSITIVE,
        flag=Flag("keep_gib", kind=float, default=50.0, read=lambda gib: int(gib * 1024**3)),
    )
    cors_origins: tuple[str, ...] = declare(
        (),
        "Origin that browsers may send requests from (CORS).",
        flag=Flag("cors_origin", each=lambda text: _origin(text)),
    )
    fetch_hosts: tuple[str, ...] = declare(
        (),
        "Host that input images may be downloaded from.",
        flag=Flag("fetch_host", each=lambda text: _host(text)),
    )
    executor: Literal["local", "ray"] = declare(
        "local",
        "Launcher of the ranks; leave it out under torchrun.",
        flag=Flag(kind=Executor, default=Executor.local, read=lambda executor: executor.value),
    )
    num_nodes: int = declare(1, "Number of machines, with --executor ray.", whole(1))

    @property
    def of_language(self) -> bool:
        """Whether the model is a language model."""
        return self.task == LANGUAGE

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self.served_model_name or self.model

    @property
    def served(self) -> tuple[str, str]:
        """The model, a folder by its whole path, and the options that change its results, in one line."""
        folder = Path(self.model).expanduser()
        numbers = {"dtype": self.dtype, "attention_backend": self.attention_backend}
        words = [described(self.loading), *(f"{name} {value}" for name, value in numbers.items() if value)]
        return str(folder.resolve()) if folder.is_dir() else self.model, ", ".join(filter(None, words))


def _origin(text: str) -> str:
    """Normalize an origin as browsers write it."""
    found = re.fullmatch(r"(https?://[^/?#@\s*]+)/?", text.lower())
    if found is None:
        raise InputError(f"--cors-origin must be as in https://example.org:8443, got {text!r}")
    return found[1]


def _host(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9.-]+", text.lower()):
        raise InputError(f"--fetch-host must be a name as in images.example.org, got {text!r}")
    if _is_private(text):
        raise InputError(f"--fetch-host {text} is a private address, which is never fetched from; leave it out")
    return text.lower()


def _is_private(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:  # a name
        return False
