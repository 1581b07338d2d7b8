"""The flags of commands, defined once; those of `shardit generate` for the example scripts, too."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from shardit.config import DiffusionParallelConfig
from shardit.diffusion.loading import shipped
from shardit.diffusion.output.from_file import check_fits, check_model_is_local, flags_of, read_record
from shardit.diffusion.output.target import SUFFIXES, check_path, numbered
from shardit.diffusion.request.images import open_image, read_image
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.engine.process.messages import SessionSpec
from shardit.errors import InputError
from shardit.language.loading.source import refuse_decoder
from shardit.language.options import LanguageOptions
from shardit.language.request.sampling_params import SamplingParams
from shardit.params import OmniDiffusionSamplingParams, field_names
from shardit.settings.checks import text_problem, whole
from shardit.settings.declare import Flag, declare
from shardit.settings.flag_class import check_flags, flag_class, parse_values, values_of
from shardit.settings.model_options import ModelOptions, given_options, model_options, split_model
from shardit.settings.paths import check_name

MODEL = "Hub id, diffusers folder or tiny/NAME."
LaunchFlags = flag_class(SessionSpec, only=("dtype", "attention_backend"))


@dataclass(frozen=True, kw_only=True)
class ParallelFlags(flag_class(DiffusionParallelConfig)):
    """The distribution of a model over ranks."""

    def parallel_config(self) -> DiffusionParallelConfig:
        """Return the configuration that the flags ask for."""
        return DiffusionParallelConfig(**values_of(self, DiffusionParallelConfig))


@dataclass(frozen=True, kw_only=True)
class ModelFlags(flag_class(ModelOptions, unset=True)):
    """Flags for loading a model."""

    config: str | None = declare(
        None,
        "Where the model is one file: folder or hub id of the pipeline's configuration.",
        flag=Flag(metavar="<folder>"),
    )

    def model_options(self) -> ModelOptions:
        """Return the options that the flags ask for. Raises InputError."""
        return model_options(**values_of(self, ModelOptions))


@dataclass(frozen=True, kw_only=True)
class InspectFlags(
    ParallelFlags, flag_class(ModelOptions, only=("variant",)), flag_class(SessionSpec, only=("dtype",))
):
    """Flags of `shardit inspect`."""

    name: str | None = declare(
        None,
        f"A model as for --model, or a configuration that shardit ships: {', '.join(shipped.names())}.",
        flag=Flag(metavar="[MODEL]", positional=True),
    )
    model: str | None = declare(None, MODEL)
    json: bool = declare(False, "Print one JSON document.")

    def what(self) -> str:
        """Return the model to look at. Raises InputError if none is given, or two are."""
        given = [value for value in (self.name, self.model) if value is not None]
        if len(given) != 1:
            raise InputError(f"name one model: a hub id, a folder, tiny/NAME, or one of {', '.join(shipped.names())}")
        return given[0]


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(
    ParallelFlags,
    ModelFlags,
    flag_class(SessionSpec, only=("dtype", "attention_backend", "timeout_s")),
    flag_class(OmniDiffusionSamplingParams, unset=True),
):
    """Flags of `shardit generate`. None means the pipeline's own default."""

    model: str = declare("", MODEL)
    from_file: Path | None = declare(
        None,
        "File made by shardit, to generate again with its model and settings; flags override them.",
        flag=Flag(metavar="<path>"),
    )
    prompt: str | None = declare(None, "Text prompt.")
    image: list[Path] | None = declare(None, "Input image.", flag=Flag(metavar="<path>"))
    output: Path | None = declare(None, "File to write. [default: output with .png, .mp4, .wav, .txt or .safetensors]")
    extra: list[str] | None = declare(
        None,
        "Any other argument of the pipeline, with a value in JSON or plain text.",
        flag=Flag(metavar="<name=value>"),
    )

    def completed(self) -> GenerateFlags:
        """Return these flags with what --from-file adds to them. Raises InputError if no model is named."""
        if self.from_file is None:
            if not self.model:
                raise InputError("--model is missing: name a hub id, a diffusers folder or tiny/NAME")
            return self
        record = read_record(self.from_file)
        if record.get("input_image_sizes") and not self.image:
            raise InputError(f"{self.from_file} was made from input images, which it does not hold; add --image")
        if not self.model:
            check_model_is_local(self.from_file, record)
        standard = {item.name: item.default for item in dataclasses.fields(self)}
        given = [name for name, value in standard.items() if getattr(self, name) != value]
        flags, extra = flags_of(record, standard, [*given, *self.extra_arguments()])
        added = [f"{name}={json.dumps(value)}" for name, value in extra.items()]
        chosen = {name: value for name, value in flags.items() if name not in given}
        return dataclasses.replace(self, **chosen, extra=[*(self.extra or ()), *added])

    def check(self, writes: bool = True) -> None:
        """Find, before torch is imported, what is wrong whatever the weights are. Raises `InputError`.

        `writes` is False on ranks that do not save, for which the output folder need not exist.
        """
        from shardit.diffusion.preflight.static_signature import static_signatures_of_model
        from shardit.diffusion.request.build import build_requests

        check_flags(self, SessionSpec)
        check_texts(self, "prompt", "negative_prompt")
        if self.config is None:
            refuse_decoder(self.model)
        if writes:
            check_path(self.output or "output.png")
        self.omni_arguments()
        prompts, params = self.prompts(), self.sampling_params()
        model, options = split_model(self.model, self.config, self.model_options())
        takes, with_image = static_signatures_of_model(model)
        if writes and self.output:
            self._check_apart({*options.single_files.values(), *(lora.path for lora in options.lora)})
        if takes is None:
            for image in self.images:
                open_image(image)
            return
        self.check_file(with_image if self.image and with_image else takes)
        build_requests(prompts, params, takes=takes, takes_with_image=with_image)  # limits the number of files, too
        if writes:
            kinds = takes.kinds_as(params.output_type)
            path, size = self.output or f"output{SUFFIXES[kinds[0]][0]}", (params.width, params.height)
            check_path(path, kinds, transparent=takes.image_mode == "RGBA", size=size)
            for file in numbered(Path(path), params.num_outputs_per_prompt)[-1:]:
                check_name("output", file)

    def _check_apart(self, weights: set[str]) -> None:
        """Raise InputError for an output that would replace a file of weights."""
        if str(Path(self.output or "").resolve()) in weights:
            raise InputError(f"output {self.output} is a file of the model or a LoRA; choose another name")

    def check_file(self, takes: PipelineSignature) -> None:
        """Raise InputError if --from-file names a file of another model that does not go with this one."""
        if self.from_file is not None:
            params = self.sampling_params()
            check_fits(self.from_file, self.config or self.model, [*params.given(), *params.extra_args], takes)

    def omni_arguments(self) -> dict[str, Any]:
        """Return the arguments of `shardit.Omni`."""
        config = {"model_config": self.config} if self.config is not None else {}
        options = given_options(self.model_options())
        launch = {"dtype": None, "attention_backend": None, **values_of(self, SessionSpec)}
        return {"model": self.model, "parallel_config": self.parallel_config(), **launch, **options, **config}

    def prompts(self) -> dict[str, Any]:
        """Return the first argument of `Omni.generate`."""
        entry: dict[str, Any] = {} if self.prompt is None else {"prompt": self.prompt}
        if self.negative_prompt is not None:
            entry["negative_prompt"] = self.negative_prompt
        if self.image:
            entry["pil_image"] = self.images
        return entry

    @functools.cached_property
    def images(self) -> list[Image]:
        """The files of --image, read. Raises InputError if one is missing or no image."""
        return [read_image(path) for path in self.image or ()]

    def sampling_params(self) -> OmniDiffusionSamplingParams:
        """Return the second argument of `Omni.generate`."""
        return self._params

    @functools.cached_property
    def _params(self) -> OmniDiffusionSamplingParams:
        given, extra = self._given(), self.extra_arguments()
        if repeated := sorted(given.keys() & extra.keys()):
            raise InputError(f"{repeated[0]} is given twice, by its own flag and by --extra; give one of them")
        fields = {name: extra.pop(name) for name in list(extra) if name in field_names() and name != "extra_args"}
        return OmniDiffusionSamplingParams(**given, **fields, **self.filled_in, extra_args=extra)

    def extra_arguments(self) -> dict[str, Any]:
        """Return the values of --extra by name. Raises InputError for what is not NAME=VALUE, or given twice."""
        return parse_values("--extra", self.extra, "use_resolution_binning=false")

    @functools.cached_property
    def filled_in(self) -> dict[str, Any]:
        """Return the defaults of a tiny model for flags that are not given; nothing for other models."""
        if not self.model.startswith("tiny/"):
            return {}
        from shardit.models import tiny

        return tiny.filled_in(self.model.removeprefix("tiny/"), {**self._given(), **self.extra_arguments()})

    def _given(self) -> dict[str, Any]:
        found = values_of(self, OmniDiffusionSamplingParams)
        return {name: value for name, value in found.items() if name != "negative_prompt"}


def check_texts(flags: Any, *names: str) -> None:
    """Raise InputError if one of these flags, as far as there are such, is no valid text."""
    for name in names:
        if problem := text_problem(getattr(flags, name, None)):
            raise InputError(f"--{name.replace('_', '-')} must be {problem}; a terminal or file of another encoding?")


AXES = ("pipeline_parallel_size", "tensor_parallel_size", "layer_partition")
"""The settings of the parallel configuration that one text at a time has a use for."""

DECODER = "Hub id, folder of transformers, GGUF file, smollm2-135m or tiny/NAME."


@dataclass(frozen=True, kw_only=True)
class LanguageFlags(
    flag_class(DiffusionParallelConfig, only=AXES),
    flag_class(SessionSpec, only=("timeout_s",)),
    flag_class(ModelOptions, only=("lora",)),
    flag_class(LanguageOptions),
    flag_class(SamplingParams, unset=True, default_from="as the model recommends"),
):
    """Flags of commands that run a language model."""

    model: str | None = declare(None, DECODER, flag=Flag(metavar="MODEL", positional=True))
    dtype: str | None = declare(
        None, "Data type of the model, such as bfloat16. [default: that of the weights; float32 for GGUF]"
    )
    max_tokens: int | None = declare(None, "Tokens of a text at most. [default: the room that is left]", whole(1))

    def check(self) -> None:
        """Find mistakes that need no model. Raises InputError, which names the flag."""
        check_texts(self, "stop", "prompt", "system")
        check_flags(self, SamplingParams, LanguageOptions, SessionSpec)
        if not self.model:
            raise InputError(f"name a model: {DECODER[0].lower()}{DECODER[1:-1]}")
        self.sampling()
        self.llm_arguments()

    def llm_arguments(self) -> dict[str, Any]:
        """Return the arguments of `shardit.LLM`."""
        return {
            "model": self.model,
            "parallel_config": DiffusionParallelConfig(**values_of(self, DiffusionParallelConfig, AXES)),
            "dtype": self.dtype,
            **values_of(self, LanguageOptions),
            **values_of(self, SessionSpec, ("timeout_s",)),
            **values_of(self, ModelOptions, ("lora",)),
        }

    def sampling(self, **defaults: Any) -> SamplingParams:
        """Return the parameters that the flags ask for; `defaults` are those of the rest."""
        return SamplingParams(**{"max_tokens": None, **defaults, **values_of(self, SamplingParams)})


@dataclass(frozen=True, kw_only=True)
class ChatFlags(LanguageFlags):
    """Flags of `shardit chat`."""

    system: str | None = declare(None, "System message, which begins the conversation.")


@dataclass(frozen=True, kw_only=True)
class CompleteFlags(LanguageFlags):
    """Flags of `shardit complete`."""

    prompt: list[str] | None = declare(None, "Text to continue. [default: standard input]")
    json: bool = declare(False, "Print one JSON document with texts, tokens and reasons.")

    def check(self) -> None:
        """Find mistakes that need no model. Raises InputError, which names the flag."""
        super().check()
        if "" in (self.prompt or ()):
            raise InputError("--prompt is empty; give a text to continue, or leave it out and send one to the input")
