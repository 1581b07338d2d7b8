"""`LLM`: causal language models, offline. Ranks are started by it, or joined where torchrun has started them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from shardit.config import DiffusionParallelConfig, config_of
from shardit.diffusion.loading.model_options import NO_OPTIONS
from shardit.engine.process.failure import Timeouts
from shardit.engine.process.messages import SESSION
from shardit.engine.session_spec import session_spec
from shardit.engine.start import start_ranks
from shardit.errors import InputError, RankError
from shardit.language.outputs import CompletionOutput, GroupOutput, RequestOutput
from shardit.language.request import PromptGroup, Row
from shardit.language.sampling_params import SamplingParams
from shardit.language.source import decoder_source
from shardit.params import RANDOM_SEED, SEED, seed_or_drawn
from shardit.settings.checks import whole

if TYPE_CHECKING:
    from shardit.language.info import LanguageInfo

TASK = "shardit.engine.tasks.language"

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What the generation configuration of a folder may say of sampling, under names that both have."""


class LLM:
    """A causal language model on as many devices as the configuration says; a context manager.

    model: a folder of transformers (config.json, weights as safetensors, tokenizer), or "tiny/NAME". parallel_config: a
    DiffusionParallelConfig, or its fields as keywords: LLM(model, pipeline_parallel_size=2). dtype: None for that of
    the weights. max_model_len: the most tokens of a prompt and its text together, None for what the model has room for.
    max_num_seqs: the most prompts that one batch has. seed: prompt i without a seed of its own has this one + i; None
    draws one for each. device, timeout_s: as for `Omni`.

    Returns when every rank has loaded its layers. Raises InputError for what can be corrected and RankError where a
    rank fails.
    """

    _timeouts = Timeouts()

    def __init__(
        self,
        model: str | os.PathLike[str] = "",
        *,
        parallel_config: DiffusionParallelConfig | None = None,
        dtype: Any = None,
        device: Any = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 32,
        seed: int | None = None,
        timeout_s: float = 600,
        **parallel: Any,
    ):
        self._closed = False
        for name, value, check in (
            ("max_model_len", max_model_len, whole(1)),
            ("max_num_seqs", max_num_seqs, whole(1)),
            ("seed", seed, SEED),
        ):
            if value is not None or name == "max_num_seqs":
                check(name, value)
        config = config_of(parallel_config, parallel, "LLM", [item.name for item in fields(EngineArgs)])
        if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
            raise InputError(f'model must be a hub id, a folder, a GGUF file or "tiny/NAME", got {model!r}')
        source = decoder_source(model)
        stages = config.pipeline_parallel_size
        self._max_num_seqs, self._groups = max_num_seqs, stages * config.data_parallel_size
        self._seed = None if seed == RANDOM_SEED else seed
        launch = {"dtype": None if dtype == "auto" else dtype, "device": device, "timeout_s": timeout_s}
        spec = session_spec(model, config, NO_OPTIONS, SESSION, task=TASK, max_in_flight=stages, **launch)
        self._tokenizer: Any = source.tokenizer()
        self._ranks: Any
        self._ranks, self._end_ranks = start_ranks(self, spec, self._timeouts)
        room = self._info.room
        if max_model_len is not None and room is not None and max_model_len > room:
            self.close()
            raise InputError(
                f"max_model_len={max_model_len} is more than the {room} tokens that the model has room for"
            )
        self._room = max_model_len or room

    @property
    def _info(self) -> LanguageInfo:
        return self._ranks.info

    def get_tokenizer(self) -> Any:
        """The tokenizer of the model, of transformers."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters that the folder of the model recommends."""
        own = self._info.defaults
        chosen = {name: own[name] for name in DEFAULTS if own.get(name) is not None}
        return SamplingParams(**(chosen if own.get("do_sample") else {**chosen, "temperature": 0.0}))

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any] | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts; the outputs are in their order.

        A prompt is a text, {"prompt": text} or {"prompt_token_ids": ids}. sampling_params: for all prompts, or one for
        each; None for `get_default_sampling_params`. Raises InputError where a prompt is too long.
        """
        if self._closed:
            raise InputError("this LLM is closed; make a new one")
        listed = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        params = self._params(sampling_params, len(listed))
        texts, ids = zip(*map(self._tokens, listed), strict=True) if listed else ((), ())
        rows = [
            (number, copy, row)
            for number, (tokens, wanted) in enumerate(zip(ids, params, strict=True))
            for copy, row in enumerate(self._rows(number, tokens, wanted))
        ]
        made = self._run([row for *_, row in rows])
        outputs: list[list[CompletionOutput]] = [[] for _ in listed]
        for (number, copy, row), result in zip(rows, made, strict=True) if made else ():
            outputs[number].append(self._completion(copy, row, result))
        return [RequestOutput(t, i, tuple(o)) for t, i, o in zip(texts, ids, outputs, strict=True)] if made else []

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations: a list of messages ({"role": ..., "content": ...}), or a list of such lists."""
        listed = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        try:
            prompts = [
                self._tokenizer.apply_chat_template(
                    list(one),
                    add_generation_prompt=add_generation_prompt,
                    chat_template=chat_template,
                    tools=tools,
                    tokenize=True,
                    return_dict=False,
                )
                for one in listed
            ]
        except Exception as error:  # templates raise what they like
            raise InputError(f"the chat template refuses the messages: {error}") from error
        return self.generate([{"prompt_token_ids": ids} for ids in prompts], sampling_params)

    def _params(self, given: Any, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        found = [given] * count if isinstance(given, SamplingParams) else list(given)
        if len(found) != count or not all(isinstance(one, SamplingParams) for one in found):
            raise InputError(f"sampling_params must be one SamplingParams, or one for each of the {count} prompts")
        return found

    def _tokens(self, prompt: Any) -> tuple[str | None, tuple[int, ...]]:
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if isinstance(text, str):
            return text, tuple(self._tokenizer(text)["input_ids"])
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else prompt
        if not isinstance(ids, Sequence) or not ids or not all(isinstance(one, int) for one in ids):
            raise InputError(
                f'a prompt is a text, {{"prompt": text}} or {{"prompt_token_ids": ids}}, got {prompt!r:.80}'
            )
        return None, tuple(ids)

    def _rows(self, number: int, tokens: tuple[int, ...], params: SamplingParams) -> list[Row]:
        room = None if self._room is None else self._room - len(tokens)
        if not tokens:
            raise InputError(f"prompt {number} has no tokens")
        if room is not None and room < 1:
            raise InputError(f"prompt {number} has {len(tokens)} tokens, and the model has room for {self._room}")
        wanted = params.max_tokens or room
        if wanted is None:
            raise InputError("max_tokens must be given: the model says of no limit")
        most = wanted if room is None else min(wanted, room)
        own = self._seed + number if params.seed is None and self._seed is not None else params.seed
        first = seed_or_drawn(own)
        return [Row(tokens, replace(params, max_tokens=most), first + copy) for copy in range(params.n)]

    def _run(self, rows: list[Row]) -> list[Any]:
        """The result of each row, in groups of rows of like length, as many at once as there are stages."""
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].prompt))
        count = min(len(rows), max(self._groups, -(-len(rows) // self._max_num_seqs)))
        dealt = [order[len(order) * k // count : len(order) * (k + 1) // count] for k in range(count)]
        groups = [PromptGroup(k, tuple(rows[number] for number in numbers)) for k, numbers in enumerate(dealt)]
        outputs: list[GroupOutput] = self._ranks.generate(lambda: groups, lambda *_: None) if groups else []
        made: list[Any] = [None] * len(rows)
        for numbers, output in zip(dealt, outputs, strict=bool(outputs)):
            if output.error is not None:
                raise RankError(-1, output.error)
            for number, result in zip(numbers, output.rows, strict=True):
                made[number] = result
        return made if outputs else []

    def _completion(self, copy: int, row: Row, result: Any) -> CompletionOutput:
        ids, reason, stop, logprobs = result
        shown = ids[:-1] if isinstance(stop, int) or (reason == "stop" and stop is None) else ids
        text = self._tokenizer.decode(shown, skip_special_tokens=row.params.skip_special_tokens)
        if isinstance(stop, str):
            text = text[: text.index(stop)]
        return CompletionOutput(copy, text, ids, reason, stop, logprobs)

    def close(self) -> None:
        """End the ranks; may be called twice. Happens by itself at the end of the program."""
        self._closed = True
        self._end_ranks()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class EngineArgs:
    """The arguments of `LLM` under vLLM's names, as data: LLM(**EngineArgs(...).as_kwargs())."""

    model: str = ""
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    dtype: str | None = None
    device: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    seed: int | None = None
    timeout_s: float = 600
    layer_partition: Sequence[int] | None = None

    def as_kwargs(self) -> dict[str, Any]:
        """The keywords of `LLM`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}
