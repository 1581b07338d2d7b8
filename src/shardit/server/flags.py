"""The flags of `shardit serve`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from shardit.diffusion.loading.model_flags import ModelFlags
from shardit.diffusion.loading.model_options import WHOLE, split_model
from shardit.errors import InputError
from shardit.flags import DtypeFlag, ParallelFlags
from shardit.loading.dtypes import setting
from shardit.loading.source import local_folder
from shardit.logs import FORMAT_VARIABLE
from shardit.server.keys import digest
from shardit.server.options import Limits, ServeOptions


class Executor(Enum):
    """Values of --executor."""

    local = "local"
    ray = "ray"


class LogFormat(Enum):
    """Values of --log-format."""

    auto = "auto"
    text = "text"
    json = "json"


@dataclass(frozen=True, kw_only=True)
class ServeFlags(ModelFlags, ParallelFlags):
    """What `shardit serve` was asked for."""

    model: Annotated[str, Argument(metavar="MODEL", help="Hub id, diffusers folder or tiny/NAME.")]
    omni: Annotated[bool, Option("--omni", help="Has no effect; accepted for compatibility with other servers.")] = (
        False
    )
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all interfaces.", envvar="SHARDIT_HOST")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Option(help="TCP port; 0 selects a free one.", envvar="SHARDIT_PORT")] = 8091
    api_key: Annotated[
        list[str] | None,
        Option(help="Key that clients must send; repeat the flag for several. [default: SHARDIT_API_KEY, else none]"),
    ] = None
    served_model_name: Annotated[str | None, Option(help="The model's name for clients. [default: MODEL]")] = None
    max_in_flight: Annotated[int | None, Option(help="Requests in flight per replica. [default: automatic]")] = None
    queue_size: Annotated[int, Option(help="Maximum number of waiting jobs; further requests get status 429.")] = 128
    jobs_per_key: Annotated[
        int | None, Option(help="Maximum number of unfinished jobs per API key. [default: no limit]")
    ] = None
    data_dir: Annotated[
        Path | None,
        Option(
            help="Folder for jobs and results. [default: one per model in ~/.local/share]", envvar="SHARDIT_DATA_DIR"
        ),
    ] = None
    keep_days: Annotated[float, Option(help="Days after which finished jobs are deleted.")] = 30.0
    keep_gib: Annotated[
        float, Option(help="Total size of files in GiB above which the oldest finished jobs are deleted.")
    ] = 50.0
    max_pixels: Annotated[int, Option(help="Maximum width x height of a result or input image.")] = Limits.pixels
    max_frames: Annotated[int, Option(help="Maximum number of frames of a video.")] = Limits.frames
    max_steps: Annotated[int, Option(help="Maximum number of denoising steps.")] = Limits.steps
    cors_origin: Annotated[
        list[str] | None,
        Option(help="Origin that browsers may send requests from (CORS); repeat the flag for several."),
    ] = None
    fetch_host: Annotated[
        list[str] | None, Option(help="Host that input images may be downloaded from; repeat the flag for several.")
    ] = None
    dtype: DtypeFlag = None
    attention_backend: Annotated[
        str | None, Option(help="Attention back end, as set_attention_backend in diffusers. [default: native]")
    ] = None
    step_timeout: Annotated[float, Option(help="Timeout for a step at a size that has not run before, in seconds.")] = (
        600.0
    )

    log_format: Annotated[
        LogFormat,
        Option(help="Format of the log; auto: text on a terminal, JSON otherwise.", envvar=FORMAT_VARIABLE),
    ] = LogFormat.auto
    executor: Annotated[Executor, Option(help="Launcher of the ranks; leave it out under torchrun.")] = Executor.local
    num_nodes: Annotated[int, Option(help="Number of machines, with --executor ray.")] = 1

    def options(self) -> ServeOptions:
        """All of it, checked. Raises InputError."""
        self._check_executor()
        for name in ("queue_size", "max_pixels", "max_frames", "max_steps", "max_in_flight", "jobs_per_key"):
            _at_least(1, name, getattr(self, name))
        for name in ("step_timeout", "keep_days", "keep_gib"):
            value = getattr(self, name)
            if not 0 < value < 1e6:
                raise InputError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        model, loading = split_model(self.model, self.config, self.model_options())
        local_folder(model)
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port must be from 0 to 65535, got {self.port}")
        return ServeOptions(
            model=str(model),
            data_dir=self.data_dir or default_data_dir(self.served_model_name or self.model),
            config=self.parallel_config(),
            dtype=setting(self.dtype, "--dtype"),
            attention_backend=self.attention_backend,
            loading=loading,
            host=self.host,
            port=self.port,
            # A single file is the model, not its configuration.
            served_model_name=self.served_model_name or (self.model if loading.single_files.get(WHOLE) else None),
            api_key_hashes=tuple(digest(key) for key in self._keys()),
            max_in_flight=self.max_in_flight,
            queue_size=self.queue_size,
            step_timeout_s=self.step_timeout,
            limits=Limits(
                pixels=self.max_pixels, frames=self.max_frames, steps=self.max_steps, jobs_per_key=self.jobs_per_key
            ),
            keep_days=self.keep_days,
            keep_bytes=int(self.keep_gib * 1024**3),
            cors_origins=tuple(map(_origin, self.cors_origin or ())),
            fetch_hosts=tuple(map(_host, self.fetch_host or ())),
            executor=self.executor.value,
            num_nodes=self.num_nodes,
        )

    def _keys(self) -> list[str]:
        told = os.environ.get("SHARDIT_API_KEY", "")
        keys = self.api_key or ([key for key in told.split(",") if key.strip()] or [""] if told else [])
        for key in keys:
            if not re.fullmatch(r"[\x21-\x7e]+", key.strip()):
                raise InputError(
                    "an API key must be ASCII text without spaces, and not empty; leave it out to serve everybody"
                )
        return [key.strip() for key in keys]

    def _check_executor(self) -> None:
        _at_least(1, "num_nodes", self.num_nodes)
        if self.num_nodes > 1 and self.executor is not Executor.ray:
            raise InputError("--num-nodes needs --executor ray; under torchrun give it --nnodes instead")
        ranks = self.parallel_config().world_size
        if ranks % self.num_nodes:
            raise InputError(
                f"{ranks} ranks cannot be spread evenly over --num-nodes {self.num_nodes}; "
                "change the parallel sizes or the number of nodes"
            )


def default_data_dir(name: str) -> Path:
    """A folder of its own for each model name, or folder with a model, in the user's data folder."""
    folder = Path(name).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else name
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "shardit" / re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip("-.")


def _origin(text: str) -> str:
    """As browsers write an origin."""
    found = re.fullmatch(r"(https?://[^/?#@\s*]+)/?", text.lower())
    if found is None:
        raise InputError(f"--cors-origin must be as in https://example.org:8443, got {text!r}")
    return found[1]


def _host(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9.-]+", text.lower()):
        raise InputError(f"--fetch-host must be a name as in images.example.org, got {text!r}")
    return text.lower()


def _at_least(minimum: int, name: str, value: int | None) -> None:
    if value is not None and value < minimum:
        raise InputError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")
