"""`Omni`: the offline API. Starts ranks, or joins those started by torchrun."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING, Any

from shardit.config import DiffusionParallelConfig, config_of
from shardit.diffusion.preflight import preflight
from shardit.engine.arguments import checked_arguments
from shardit.engine.process.failure import Timeouts
from shardit.engine.process.messages import SESSION
from shardit.engine.progress_bars import Bars
from shardit.engine.session_spec import LAUNCH_NAMES, session_spec
from shardit.engine.start import start_ranks
from shardit.errors import InputError
from shardit.language.loading.source import refuse_decoder
from shardit.settings.model_options import OPTION_NAMES, split_model, take_options

if TYPE_CHECKING:
    from shardit.diffusion.output.output import Output
    from shardit.diffusion.request.model_info import ModelInfo
    from shardit.diffusion.request.pipeline_signature import PipelineSignature


class Omni:
    """A diffusers pipeline on the devices of `parallel_config`; a context manager.

    model: hub id, folder or "tiny/NAME". model_config: if `model` is one .safetensors file in its authors' format, the
    folder or hub id with the pipeline's configuration. settings: options for loading and running the model (see
    "Settings of `Omni`"), or fields of `parallel_config` in its place: Omni(model, pipeline_parallel_size=2).

    Returns when every rank has loaded its share. Raises InputError for errors that the caller can correct and RankError
    if a rank fails. Under torchrun no processes are started, and every rank makes its own Omni with the same arguments.
    """

    _session = SESSION  # replaced by tests, along with shorter times
    _timeouts = Timeouts()

    @checked_arguments("Omni")
    def __init__(
        self,
        model: str | os.PathLike[str] = "",  # as if it were required, so that a wrong keyword in its place is named
        *,
        parallel_config: DiffusionParallelConfig | None = None,
        model_config: str | os.PathLike[str] | None = None,
        **settings: Any,
    ):
        self._closed = False
        options = take_options(settings)
        launch = {name: settings.pop(name) for name in LAUNCH_NAMES if name in settings}
        own = ("model", "parallel_config", "model_config", *LAUNCH_NAMES, *OPTION_NAMES)
        config = config_of(parallel_config, settings, "Omni", own)
        if model_config is None and isinstance(model, (str, os.PathLike)):
            refuse_decoder(model)
        model, options = split_model(model, model_config, options)
        spec = session_spec(model, config, options, self._session, **launch)
        if self._session == SESSION:
            preflight.check(spec.model, config, options, dtype=spec.dtype, attention_backend=spec.attention_backend)
        self._ranks, self._end_ranks = start_ranks(self, spec, self._timeouts)

    def generate(
        self,
        prompts: Any = None,
        params: Any = None,
        *,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        pil_image: Any = None,
        sampling_params_list: Any = None,
        **overrides: Any,
    ) -> list[Output]:
        """Run one request per prompt and return their outputs in order.

        `prompts` is a string, a dict or a list of them, `params` one OmniDiffusionSamplingParams or one for each.
        `sampling_params_list` is vLLM-Omni's name for `params`; there a list of one applies to all prompts. `overrides`
        replace fields of params in all requests, the keys of a prompt's dict in that request. A request that fails
        alone has its error in its Output. Under torchrun all ranks call this together; the outputs are on rank 0, the
        others get []. SHARDIT_PROGRESS=0 turns the progress bars off.
        """
        from shardit.diffusion.request.build import build_requests, params_of

        if self._closed:
            raise InputError("this Omni is closed; make a new one")
        build = functools.partial(
            build_requests,
            prompts,
            params_of(params, sampling_params_list),
            prompt=prompt,
            negative_prompt=negative_prompt,
            pil_image=pil_image,
            overrides=overrides,
            takes=self._info.signature,
            takes_with_image=self._info.signature_with_image,
        )
        with contextlib.closing(Bars()) as bars:
            return self._ranks.generate(build, bars.update)

    @property
    def _info(self) -> ModelInfo:
        assert self._ranks.info is not None  # it was started
        return self._ranks.info

    @property
    def takes(self) -> PipelineSignature:
        """Signature of the model's pipeline: its arguments and outputs."""
        return self._info.signature

    @property
    def notes(self) -> list[str]:
        """Notes from the ranks about the model and how it was cut."""
        return list(self._info.notes)

    def close(self) -> None:
        """Stop the ranks; may be called twice. Called automatically when the program exits."""
        self._closed = True
        self._end_ranks()

    def __enter__(self) -> Omni:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
