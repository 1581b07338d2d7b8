"""The flags of `shardit chat` and `shardit complete`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardit.config import DiffusionParallelConfig
from shardit.engine.process.messages import SessionSpec
from shardit.errors import InputError
from shardit.language.request.sampling_params import SamplingParams
from shardit.settings.checks import whole
from shardit.settings.declare import Flag, declare
from shardit.settings.flag_class import check_flags, flag_class, values_of

AXES = ("pipeline_parallel_size", "tensor_parallel_size", "layer_partition")
"""The settings of the parallel configuration that one text at a time has a use for."""

MODEL = "Hub id, folder of transformers, GGUF file, smollm2-135m or tiny/NAME."


@dataclass(frozen=True, kw_only=True)
class LanguageFlags(
    flag_class(DiffusionParallelConfig, only=AXES),
    flag_class(SessionSpec, only=("timeout_s",)),
    flag_class(SamplingParams, unset=True, default_from="as the model recommends"),
):
    """Flags of commands that run a language model."""

    model: str | None = declare(None, MODEL, flag=Flag(metavar="MODEL", positional=True))
    dtype: str | None = declare(
        None, "Data type of the model, such as bfloat16. [default: that of the weights; float32 for GGUF]"
    )
    max_tokens: int | None = declare(None, "Tokens of a text at most. [default: the room that is left]", whole(1))
    max_model_len: int | None = declare(
        None, "Tokens of prompt and text at most. [default: the room of the model]", whole(1)
    )

    def check(self) -> None:
        """Find mistakes that need no model. Raises InputError, which names the flag."""
        from shardit.language.loading.source import decoder_source

        check_flags(self, SamplingParams)
        if not self.model:
            raise InputError(f"name a model: {MODEL[0].lower()}{MODEL[1:-1]}")
        self.sampling()
        self.llm_arguments()
        decoder_source(self.model)

    def llm_arguments(self) -> dict[str, Any]:
        """The arguments of `shardit.LLM`."""
        return {
            "model": self.model,
            "parallel_config": DiffusionParallelConfig(**values_of(self, DiffusionParallelConfig, AXES)),
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            **values_of(self, SessionSpec, ("timeout_s",)),
        }

    def sampling(self, **defaults: Any) -> SamplingParams:
        """The parameters that the flags ask for; `defaults` are those of the rest."""
        return SamplingParams(**{"max_tokens": None, **defaults, **values_of(self, SamplingParams)})


@dataclass(frozen=True, kw_only=True)
class ChatFlags(LanguageFlags):
    """What `shardit chat` was asked for."""

    system: str | None = declare(None, "System message, which begins the conversation.")


@dataclass(frozen=True, kw_only=True)
class CompleteFlags(LanguageFlags):
    """What `shardit complete` was asked for."""

    prompt: list[str] | None = declare(None, "Text to continue. [default: standard input]")
    json: bool = declare(False, "Print one JSON document with texts, tokens and reasons.")
