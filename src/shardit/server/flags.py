"""The flags of `shardit serve`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import MISSING, dataclass
from enum import Enum
from pathlib import Path

from shardit.engine.process.messages import TASK
from shardit.errors import InputError
from shardit.flags import LaunchFlags, ModelFlags, ParallelFlags
from shardit.language.loading.source import named_decoder
from shardit.language.options import LanguageOptions
from shardit.language.preflight import check_decoder, check_decoder_options
from shardit.loading.dtypes import setting
from shardit.loading.source import local_folder
from shardit.logs import FORMAT_VARIABLE
from shardit.server.keys import digest
from shardit.server.options import LANGUAGE, Executor, RequestLimits, ServeOptions
from shardit.settings.declare import Flag, declare, declared
from shardit.settings.flag_class import check_flags, flag_class, values_of
from shardit.settings.model_options import WHOLE, ModelOptions, split_model
from shardit.settings.paths import home_folder, user_path


class LogFormat(Enum):
    """Values of --log-format."""

    auto = "auto"
    text = "text"
    json = "json"


_MODEL = "Hub id, folder of diffusers or transformers, GGUF file, smollm2-135m or tiny/NAME."


@dataclass(frozen=True, kw_only=True)
class ServeFlags(
    ParallelFlags,
    ModelFlags,
    LaunchFlags,
    flag_class(LanguageOptions),
    flag_class(RequestLimits),
    flag_class(ServeOptions),
):
    """The flags of `shardit serve`."""

    model: str = declare(MISSING, _MODEL, flag=Flag(metavar="MODEL", positional=True))
    omni: bool = declare(False, "Has no effect; accepted for compatibility with other servers.")
    api_key: list[str] | None = declare(None, "Key that clients must send. [default: SHARDIT_API_KEY, else none]")
    log_format: LogFormat = declare(
        LogFormat.auto,
        "Format of the log; auto: text on a terminal, JSON otherwise.",
        flag=Flag(envvar=FORMAT_VARIABLE),
    )

    def options(self) -> ServeOptions:
        """Return all options, checked. Raises InputError."""
        check_flags(self, ServeOptions, LanguageOptions, RequestLimits)
        self._check_nodes()
        task, model, loading = self._model()
        given = {
            # A single file is the model, not its configuration.
            "served_model_name": self.model if loading.single_files.get(WHOLE) else None,
            **values_of(self, ServeOptions),
            "data_dir": user_path("--data-dir", self.data_dir)
            if self.data_dir is not None
            else default_data_dir(self.served_model_name or self.model),
        }
        return ServeOptions(
            model=model,
            config=self.parallel_config(),
            dtype=setting(self.dtype, "--dtype"),
            attention_backend=self.attention_backend,
            loading=loading,
            task=task,
            api_key_hashes=tuple(digest(key) for key in self._keys()),
            language=LanguageOptions(**values_of(self, LanguageOptions)),
            limits=RequestLimits(**values_of(self, RequestLimits)),
            **given,
        )

    def _model(self) -> tuple[str, str, ModelOptions]:
        """Return the task, the model, and how it is loaded. What the model is follows from its files."""
        decoder = named_decoder(self.model) if self.config is None else None
        if decoder is not None:
            options = self.model_options()
            check_decoder_options(self.model, {"attention_backend": self.attention_backend}, options)
            check_decoder(decoder, self.parallel_config(), self.max_model_len, options.lora)
            self._refuse_set(RequestLimits, "a language model", only=("pixels", "frames", "steps"))
            return LANGUAGE, self.model, options
        self._refuse_set(LanguageOptions, "no language model")
        model, loading = split_model(self.model, self.config, self.model_options())
        local_folder(model)
        return TASK, str(model), loading

    def _refuse_set(self, cls: type, kind: str, only: Collection[str] = ()) -> None:
        """Raise InputError for a flag of `cls` with another value than its default. kind: of this model."""
        for item in declared(cls):
            flag = item.metadata["flag"]
            if flag is not None and (not only or item.name in only):
                name = flag.name or item.name
                if getattr(self, name) not in (None, item.default):
                    raise InputError(f"--{name.replace('_', '-')}: {self.model} is {kind}; leave it out")

    def _keys(self) -> list[str]:
        value = os.environ.get("SHARDIT_API_KEY", "")
        keys = self.api_key or ([key for key in value.split(",") if key.strip()] or [""] if value else [])
        for key in keys:
            if not re.fullmatch(r"[\x21-\x7e]+", key.strip()):
                raise InputError(
                    "an API key must be ASCII text without spaces, and not empty; leave it out to serve everybody"
                )
        return [key.strip() for key in keys]

    def _check_nodes(self) -> None:
        if self.num_nodes > 1 and self.executor is not Executor.ray:
            raise InputError("--num-nodes needs --executor ray; under torchrun give it --nnodes instead")
        ranks = self.parallel_config().world_size
        if ranks % self.num_nodes:
            raise InputError(
                f"{ranks} ranks cannot be distributed evenly over --num-nodes {self.num_nodes}; "
                "change the parallel sizes or the number of nodes"
            )


_LONGEST_NAME = 200
"""Characters of a folder's name; file systems take 255 bytes."""


def default_data_dir(name: str) -> Path:
    """Return a folder in the user's data folder, one for each model name or model folder. Raises InputError."""
    with contextlib.suppress(InputError):  # a name that clients see need be no path
        folder = user_path("model", name)
        name = str(folder.resolve()) if folder.is_dir() else name
    value = os.environ.get("XDG_DATA_HOME")
    base = user_path("XDG_DATA_HOME", value) if value else home_folder("give --data-dir") / ".local" / "share"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip("-.")
    if len(plain) > _LONGEST_NAME:
        plain = f"{plain[:_LONGEST_NAME]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
    return base / "shardit" / plain
