"""The flags that say how a model is loaded, of `shardit generate` and `shardit serve`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from typer import Option

from shardit.diffusion.loading.model_options import OPTION_NAMES, ModelOptions, given_options, model_options
from shardit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How a model is loaded."""

    config: Annotated[
        str | None,
        Option(
            metavar="<folder>", help="Where the model is one file: folder or hub id of the pipeline's configuration."
        ),
    ] = None
    single_file: Annotated[
        list[str] | None,
        Option(
            metavar="<component=path>",
            help="File in a format that from_single_file reads, in place of a component; repeat the flag for several.",
        ),
    ] = None
    variant: Annotated[str | None, Option(help="Variant of the weight files, such as fp16, as in diffusers.")] = None
    scheduler: Annotated[
        str | None, Option(metavar="<class>", help="Scheduler of diffusers by its class name. [default: the model's]")
    ] = None
    flow_shift: Annotated[float | None, Option(help="Shift of a flow-matching scheduler. [default: the model's]")] = (
        None
    )
    scheduler_arg: Annotated[
        list[str] | None,
        Option(
            metavar="<name=value>",
            help="Argument of the scheduler, as in use_karras_sigmas=true; repeat the flag for several.",
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        Option(
            metavar="<path[:scale]>",
            help="LoRA to load at start: a file, folder or hub id; repeat the flag for several.",
        ),
    ] = None
    vae_tiling: Annotated[bool, Option("--vae-tiling", help="Let the VAE work tile by tile, with less memory.")] = False
    vae_slicing: Annotated[
        bool, Option("--vae-slicing", help="Let the VAE work picture by picture, with less memory.")
    ] = False

    def model_options(self) -> ModelOptions:
        """The options that the flags ask for. Raises InputError."""
        given = {name: getattr(self, name) for name in OPTION_NAMES if name not in ("scheduler_args", "single_files")}
        files = parse_values("--single-file", self.single_file, "transformer=flux.safetensors")
        return model_options(
            **given,
            scheduler_args=parse_values("--scheduler-arg", self.scheduler_arg, "use_karras_sigmas=true"),
            single_files={name: str(path) for name, path in files.items()},
        )

    def model_arguments(self) -> dict[str, Any]:
        """Those that were given, under the names of `shardit.Omni`. Raises InputError."""
        found = given_options(self.model_options())
        return {**found, **({"model_config": self.config} if self.config is not None else {})}


def parse_values(flag: str, entries: Sequence[str] | None, example: str) -> dict[str, Any]:
    """The values of a repeated `flag name=value` by name. Raises InputError for other text, and what is given twice."""
    found: dict[str, Any] = {}
    for entry in entries or ():
        name, sign, text = entry.partition("=")
        if not (sign and name.isidentifier()):
            raise InputError(f"{flag} must be name=value, as in {example}, got {entry!r}")
        if name in found:
            raise InputError(f"{flag} {name} is given twice; give it once")
        found[name] = _as_value(flag, name, text)
    return found


def _as_value(flag: str, name: str, text: str) -> Any:
    """The value of `flag name=text`: JSON, or the text itself where it is none."""
    python = {"True": "true", "False": "false", "None": "null"}
    if text in python:
        raise InputError(f"{flag} {name}={text}: values are JSON; write {name}={python[text]}")
    try:
        return json.loads(text)
    except ValueError:
        return text
