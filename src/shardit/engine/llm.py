"""`LLM`: causal language models, offline. Ranks are started by it, or joined if torchrun has started them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.config import DiffusionParallelConfig, config_of
from shardit.engine.arguments import checked_arguments
from shardit.engine.engine_args import EngineArgs, check_launch
from shardit.engine.nodes.ray_placement import RayPlacement
from shardit.engine.process.failure import Timeouts
from shardit.engine.process.messages import SESSION
from shardit.engine.process.process import started_by_torchrun
from shardit.engine.progress_bars import TokenBar
from shardit.engine.session_spec import session_spec
from shardit.engine.start import start_ranks
from shardit.engine.streaming import Pieces, in_background, in_thread
from shardit.engine.tasks.task import OnProgress
from shardit.errors import InputError, RankError
from shardit.language.grammar.grammars import check_forms
from shardit.language.limits import check_max_model_len
from shardit.language.loading.adapter import adapted_tokenizer
from shardit.language.loading.source import decoder_source
from shardit.language.options import LanguageOptions
from shardit.language.preflight import check_decoder
from shardit.language.request.defaults import recommended
from shardit.language.request.messages import chat_tokens, conversations_of, template_text, tool_notes
from shardit.language.request.outputs import CompletionChunk, GroupOutput, RequestOutput
from shardit.language.request.prompt_batch import PromptBatch
from shardit.language.request.prompts import (
    Prompt,
    check_tokens,
    params_of_each,
    prompt_list,
    rows_of,
    tokens_of,
)
from shardit.language.request.rows import PromptGroup
from shardit.language.request.sampling_params import SamplingParams
from shardit.loading.missing_packages import FRAMEWORKS, check_installed
from shardit.params import RANDOM_SEED
from shardit.settings.model_options import model_options

if TYPE_CHECKING:
    from shardit.language.info import LanguageInfo

log = logging.getLogger(__name__)

RAY_OPTION = 'distributed_executor_backend="ray"'
TASK = "shardit.engine.tasks.language"


def _check_model(model: Any) -> None:
    if isinstance(model, EngineArgs):
        raise InputError("LLM takes the arguments, not an EngineArgs of them: give LLM(**args.as_kwargs())")
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise InputError(f'model must be a hub id, a folder, a GGUF file or "tiny/NAME", got {model!r}')


class LLM:
    """A causal language model on the devices of the configuration; a context manager.

    model: a hub id, a folder of transformers (config.json, weights as safetensors, tokenizer), a GGUF file, a short
    name ("smollm2-135m"), or "tiny/NAME". parallel_config: a DiffusionParallelConfig, or its fields as keywords:
    LLM(model, pipeline_parallel_size=2). dtype: None for that of the weights (float32 for GGUF files). max_model_len:
    the most tokens of a prompt and its text together, None for what the model has room for.
    max_num_seqs: maximum prompts of a batch; there is a batch for each stage. max_num_batched_tokens: maximum tokens
    of one step for prompts, None for 64 on CPUs and 512 on GPUs; fewer delay running texts less. kv_cache_memory:
    maximum bytes of keys and values on a rank, also as "2GiB", None for half of its free memory; if it is full, the
    youngest text gives up its cache and computes it again later. seed: text i of a call, if its prompt has no seed, has
    this one + i; None draws one for each. gpu_memory_utilization: if given, the share of a rank's memory into which its
    weights and the cache of one request of max_model_len tokens must fit. distributed_executor_backend: "mp" or None
    for processes of this machine, "ray" for actors of Ray (pip install "shardit[ray]") on num_nodes machines, each with
    an equal share of the ranks. lora: adapters of peft that are merged into the weights, each a folder or hub id (with
    ":SCALE" at its end, if need be), (path, scale), or a list of these. device, timeout_s: as for `Omni`.

    Returns when every rank has loaded its layers. Raises InputError for what can be corrected and RankError if a
    rank fails.
    """

    _timeouts = Timeouts()

    @checked_arguments("LLM")
    def __init__(
        self,
        model: str | os.PathLike[str] = "",
        *,
        parallel_config: DiffusionParallelConfig | None = None,
        dtype: Any = None,
        device: Any = None,
        max_model_len: int | None = None,
        max_num_seqs: int = EngineArgs.max_num_seqs,
        max_num_batched_tokens: int | None = None,
        kv_cache_memory: int | str | None = None,
        seed: int | None = None,
        gpu_memory_utilization: float | None = None,
        distributed_executor_backend: str | None = None,
        num_nodes: int = 1,
        lora: Any = None,
        timeout_s: float = EngineArgs.timeout_s,
        **parallel: Any,
    ):
        self._closed = False
        _check_model(model)
        options = LanguageOptions(
            max_model_len, max_num_seqs, max_num_batched_tokens, kv_cache_memory, gpu_memory_utilization
        )
        config = config_of(parallel_config, parallel, "LLM", ["parallel_config", *EngineArgs.names()], listed=False)
        check_launch(config, seed, timeout_s, distributed_executor_backend, num_nodes)
        check_installed(FRAMEWORKS)
        placement = RayPlacement(num_nodes, RAY_OPTION) if distributed_executor_backend == "ray" else None
        source = decoder_source(model)
        adapters = model_options(lora=lora)
        check_decoder(source, config, max_model_len, adapters.lora)
        self._seed = None if seed == RANDOM_SEED else seed
        launch = {"dtype": None if dtype == "auto" else dtype, "device": device, "timeout_s": timeout_s}
        fixed = {"task": TASK, "max_in_flight": config.pipeline_parallel_size, "can_cancel": True}
        spec = session_spec(model, config, adapters, SESSION, language=options, **fixed, **launch)
        self._tokenizer: Any
        self._ranks: Any
        read = functools.partial(adapted_tokenizer, source, adapters.lora)
        # The ranks start at the same time; those of torchrun are this process.
        reading = read() if started_by_torchrun(os.environ) else in_background(read)
        self._ranks, self._end_ranks = start_ranks(self, spec, self._timeouts, placement)
        try:
            self._tokenizer = reading.result() if isinstance(reading, Future) else reading
            limit = self._info.max_model_len
            check_max_model_len(max_model_len, limit)
        except BaseException:
            self.close()
            raise
        self._max_model_len = max_model_len or limit

    @property
    def _info(self) -> LanguageInfo:
        return self._ranks.info

    @property
    def notes(self) -> list[str]:
        """Return notes about the model and how it was sharded, such as parts that every tensor rank keeps whole."""
        return list(self._info.notes)

    def get_tokenizer(self) -> Any:
        """Return the tokenizer of the model, of transformers."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters that the folder of the model recommends."""
        return SamplingParams(**recommended(self._info.defaults))

    @checked_arguments("LLM.generate", SamplingParams)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts; the outputs are in their order.

        A prompt is a text, {"prompt": text}, {"prompt_token_ids": ids} or ids. sampling_params: for all prompts, or one
        for each; None for `get_default_sampling_params`. use_tqdm: whether a terminal shows progress. Raises InputError
        if a prompt is too long.
        """
        batch = self._batch(prompts, sampling_params)
        with contextlib.closing(TokenBar(len(batch.rows), shown=use_tqdm)) as bar:
            made = self._run(batch, lambda _: bar.update)
        return batch.outputs(made) if made else []

    @checked_arguments("LLM.stream", SamplingParams)
    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[CompletionChunk]:
        """Continue prompts and yield pieces of text as they come; arguments as of `generate`.

        A piece has `prompt_index` (number of its prompt), `index` (number of its text), `text` and `token_ids` (the new
        ones); the last piece of a text has its `finish_reason` and `stop_reason`. The joined pieces are the text of
        `generate`. If the iterator is closed early, the texts end with their current step. Raises InputError under
        torchrun.
        """
        if started_by_torchrun(os.environ):
            raise InputError("stream: ranks of torchrun run in step; use generate, or start LLM without torchrun")
        batch = self._batch(prompts, sampling_params)
        if any(row.params.prompt_logprobs is not None for *_, row in batch.rows):
            raise InputError("prompt_logprobs: pieces of texts have none; leave it out, or use generate")
        pieces = Pieces(batch)
        yield from in_thread(
            lambda give: [one.rows[0] for one in self._run(batch, lambda groups: pieces.takes(groups, give))],
            pieces.rest,
            self._ranks.cancel_all,
        )

    @checked_arguments("LLM.chat", SamplingParams)
    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template: str | Path | None = None,
        tools: Sequence[Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations: a list of messages ({"role": ..., "content": ...}), or a list of such lists. Other
        arguments: as of `generate` and `chat_prompt`."""
        prompts = [
            self.chat_prompt(one, add_generation_prompt=add_generation_prompt, chat_template=chat_template, tools=tools)
            for one in conversations_of(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    @checked_arguments("LLM.chat_prompt")
    def chat_prompt(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | Path | None = None,
        tools: Sequence[Any] | None = None,
    ) -> dict[str, Any]:
        """Return the prompt that the chat template makes of a conversation, for `generate` and `stream`. Warns if the
        template shows no tools. chat_template: its text, or the path of a file with it."""
        chat_template = template_text(chat_template)
        for note in tool_notes(tools, chat_template or self._tokenizer.chat_template):
            log.warning(note)
        return {"prompt_token_ids": chat_tokens(self._tokenizer, messages, chat_template, tools, add_generation_prompt)}

    def _batch(self, prompts: Any, sampling_params: Any) -> PromptBatch:
        if self._closed:
            raise InputError("this LLM is closed; make a new one")
        given = prompt_list(prompts)
        chosen = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = params_of_each(chosen, len(given))
        for one in params:
            check_tokens(one, self._info.vocabulary)
        check_forms((one.structured_outputs for one in params), self._tokenizer)
        read = [tokens_of(prompt, self._tokenizer, self._info.vocabulary) for prompt in given]
        counts = accumulate((one.n for one in params), initial=0)
        seeds = [None if self._seed is None else self._seed + before for before in counts]
        rows = [
            (number, copy, row)
            for number, ((_, tokens), wanted) in enumerate(zip(read, params, strict=True))
            for copy, row in enumerate(rows_of(number, tokens, wanted, self._max_model_len, seeds[number]))
        ]
        return PromptBatch(self._tokenizer, read, rows)

    def _run(self, batch: PromptBatch, on_progress: Callable[[list[list[int]]], OnProgress]) -> list[GroupOutput]:
        """Return the output of each row; none on ranks of torchrun but the first. on_progress: made of the numbers of
        the rows of each group."""
        rows = [row for *_, row in batch.rows]
        # Prompts of like lengths are together in a batch, with little padding.
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt))
        requests = [PromptGroup((rows[index],)) for index in order]
        outputs: list[GroupOutput | None]
        outputs = self._ranks.generate(lambda: requests, on_progress([[one] for one in order])) if requests else []
        made: dict[int, GroupOutput] = {}
        for index, output in zip(order, outputs, strict=bool(outputs)):
            if output is not None and output.error is not None:
                raise RankError(-1, output.error)
            if output is not None:
                made[index] = output
        return [made[index] for index in range(len(made))] if outputs and None not in outputs else []

    def close(self) -> None:
        """Stop the ranks; may be called twice. Called automatically when the program exits."""
        self._closed = True
        self._end_ranks()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
