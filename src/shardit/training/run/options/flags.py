"""The flags of `shardit train`, and the settings that they and a TOML file make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardit.config import DiffusionParallelConfig
from shardit.errors import InputError
from shardit.settings.declare import Flag, declare
from shardit.settings.flag_class import Once, check_flags, flag_class, values_of
from shardit.settings.paths import user_path
from shardit.training.run.options.toml import AXES, read_toml
from shardit.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class TrainFlags(flag_class(DiffusionParallelConfig, only=AXES, unset=True), flag_class(TrainSettings, unset=True)):
    """Flags of `shardit train`. None: the value in the file of --config, or the default."""

    config: Path | None = declare(
        None,
        "TOML file with settings: each flag is a key, with underscores. Flags override it.",
        flag=Flag(metavar="<path>"),
    )

    def settings(self) -> tuple[TrainSettings, DiffusionParallelConfig]:
        """Return what the flags and the file ask for. Raises InputError."""
        check_flags(self, TrainSettings)
        given = {**values_of(self, TrainSettings), **values_of(self, DiffusionParallelConfig, AXES)}
        of_file = {} if self.config is None else read_toml(self.config)
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if one in given:
                of_file.pop(other, None)  # the flag takes its place
        merged = {**of_file, **given}
        check_together(merged)
        config = DiffusionParallelConfig(**{name: merged.pop(name) for name in AXES if name in merged})
        for name in ("output", "cache"):
            if merged.get(name) is not None:
                merged[name] = user_path(f"--{name}", merged[name])
        return TrainSettings(**merged), config


def check_together(given: Mapping[str, Any]) -> None:
    """Raise InputError for settings that were given, but have no effect, or contradict each other."""
    if "steps" in given and "epochs" in given:
        raise InputError("steps and epochs are given: they say the same; give one of them")
    if given.get("full"):
        adapters = [name for name in given if name.startswith("lora_") or name == "train_text_encoder"]
        wrong = next((name for name in adapters if given[name]), None)
        if wrong is not None:
            raise InputError(f"{wrong} is about a LoRA, and full trains all weights: leave one of them out")
    if "shift" in given and given.get("timesteps") not in (None, "shifted"):
        raise InputError("shift has an effect with timesteps=shifted alone: add --timesteps shifted, or leave it out")
    for every, what, other in (
        ("sample_every", "sample_prompts", "prompts to make samples of"),
        ("validate_every", "validation_data", "held-out data"),
    ):
        if given.get(every) and not given.get(what):
            raise InputError(f"{every}={given[every]} needs {other}: give --{what.replace('_', '-')}")
        if given.get(what) and not given.get(every):
            raise InputError(f"{what} is given, but no {every}: give --{every.replace('_', '-')} N, the steps between")


class RepeatedFlags(Once):
    """A command without positional arguments, whose repeated flags take several values each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of a command line: `--flag a b` is `--flag a --flag b`."""
        repeated = {name for one in self.get_params(ctx) if getattr(one, "multiple", False) for name in one.opts}
        expanded: list[str] = []
        flag, first = None, False
        for text in args:
            if text.startswith("--"):
                name, sign, _ = text.partition("=")
                flag, first = name if name in repeated else None, not sign
            elif flag is not None:
                expanded += [] if first else [flag]
                first = False
            expanded.append(text)
        return super().parse_args(ctx, expanded)
