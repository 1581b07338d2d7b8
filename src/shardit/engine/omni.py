"""`Omni`: the offline API. Ranks are started by it, or joined where torchrun has started them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardit.config import DiffusionParallelConfig, config_of
from shardit.diffusion.loading.model_options import ModelOptions, model_options, split_model
from shardit.diffusion.preflight import preflight
from shardit.engine.local_ranks import LocalRanks
from shardit.engine.process.failure import Timeouts
from shardit.engine.process.messages import SESSION, SessionSpec
from shardit.engine.process.process import started_by_torchrun
from shardit.engine.rank.worker import JoinedRanks
from shardit.errors import InputError
from shardit.loading.dtypes import setting
from shardit.loading.source import local_folder

if TYPE_CHECKING:
    from shardit.diffusion.output.output import Output
    from shardit.diffusion.request.model_info import ModelInfo
    from shardit.diffusion.request.pipeline_signature import PipelineSignature

MAX_TIMEOUT_S = 1_000_000
"""Eleven days; poll() counts milliseconds in 31 bits."""


class Omni:
    """A diffusers pipeline on as many devices as `parallel_config` says; a context manager.

    model: hub id, folder or "tiny/NAME". dtype: "bfloat16", "float16", "float32", a torch dtype, None for what
    diffusers would choose for each component, or a dict of dtypes by component, as in diffusers. device: "cuda", "cpu"
    or None for what there is. max_in_flight: requests that run at the same time. timeout_s: longest time without any
    progress, in seconds. attention_backend: a name that diffusers' set_attention_backend takes, None for its default.
    model_config: where `model` is one .safetensors file in a format of its authors, the folder or hub id with the
    pipeline's configuration. single_files: such files by the component that they replace, {"transformer": path}.
    variant: infix of the weight files, such as "fp16". scheduler, scheduler_args, flow_shift: the class name of a
    scheduler of diffusers in place of the model's, arguments of it, its shift. lora: adapters that stay active: a path
    or hub id (with ":SCALE" at its end, if need be), (path, scale), {"path": ..., "scale": ...}, or a list of these.
    vae_tiling, vae_slicing: whether the VAE works tile by tile, picture by picture, to take less memory.
    parallel: fields of `parallel_config` as keywords, in its place: Omni(model, pipeline_parallel_size=2).

    Returns when every rank has loaded its share. Raises InputError for what can be corrected and RankError where a
    rank fails. Under torchrun no processes are started, and every rank makes its own Omni with the same arguments.
    """

    _session = SESSION  # tests put a stand-in here, and shorter times
    _timeouts = Timeouts()

    def __init__(
        self,
        model: str | os.PathLike[str] = "",  # as if it were required: so a wrong keyword in its place is named
        *,
        parallel_config: DiffusionParallelConfig | None = None,
        dtype: Any = None,
        device: Any = None,
        max_in_flight: int = 1,
        timeout_s: float = 600,
        attention_backend: str | None = None,
        model_config: str | os.PathLike[str] | None = None,
        single_files: Mapping[str, Any] | None = None,
        variant: str | None = None,
        scheduler: str | None = None,
        scheduler_args: Mapping[str, Any] | None = None,
        flow_shift: float | None = None,
        lora: Any = None,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        **parallel: Any,
    ):
        self._closed = False
        own = [name for name in inspect.signature(Omni).parameters if name != "parallel"]
        config = config_of(parallel_config, parallel, "Omni", own)
        options = model_options(
            variant=variant,
            single_files=single_files,
            scheduler=scheduler,
            scheduler_args=scheduler_args,
            flow_shift=flow_shift,
            lora=lora,
            vae_tiling=vae_tiling,
            vae_slicing=vae_slicing,
        )
        model, options = split_model(model, model_config, options)
        spec = _spec(model, config, dtype, device, max_in_flight, timeout_s, attention_backend, options, self._session)
        if self._session == SESSION:
            preflight.check(spec.model, config, options, dtype=spec.dtype, attention_backend=spec.attention_backend)
        self._ranks = JoinedRanks(spec) if started_by_torchrun(os.environ) else LocalRanks(spec, self._timeouts)
        self._finalizer = weakref.finalize(self, self._ranks.close)
        try:
            self._ranks.start()
        except BaseException:
            self.close()
            raise

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
        `sampling_params_list` is vLLM-Omni's name for them; a list of one is for all prompts there.
        `overrides` replace fields of params in all requests, the keys of a prompt's dict in that request. A request
        that fails alone has its error in its Output. Under torchrun all ranks call this together; the outputs are on
        rank 0, the others get []. SHARDIT_PROGRESS=0 turns the progress bars off.
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
        """What the model's pipeline takes and makes."""
        return self._info.signature

    @property
    def notes(self) -> list[str]:
        """What the ranks had to say about the model and how it was cut."""
        return list(self._info.notes)

    def close(self) -> None:
        """End the ranks; may be called twice. Happens by itself at the end of the program."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> Omni:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Bars:
    """A progress bar for each request."""

    def __init__(self) -> None:
        self._bars: dict[int, Any] = {}
        self._off = os.environ.get("SHARDIT_PROGRESS") == "0"

    def update(self, index: int, step: int, total: int) -> None:
        """Show that request `index` has finished `step` of `total` steps."""
        if self._off:
            return
        if index not in self._bars:
            from tqdm import tqdm

            # Seconds per step even where tqdm would turn to steps per second.
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
            self._bars[index] = tqdm(total=total, desc=f"request {index}", unit="step", bar_format=form)
        bar = self._bars[index]
        bar.update(step - bar.n)
        if step >= total:
            bar.close()

    def close(self) -> None:
        """Leave the bars as they are and end their lines."""
        for bar in self._bars.values():
            bar.close()


def _spec(
    model: Any,
    config: DiffusionParallelConfig,
    dtype: Any,
    device: Any,
    max_in_flight: Any,
    timeout_s: Any,
    attention_backend: Any,
    options: ModelOptions,
    session: str,
) -> SessionSpec:
    """Check the types of all arguments; what they mean is checked where the model is read."""
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise InputError(f'model must be a hub id, a folder or "tiny/NAME", got {model!r}')
    if session == SESSION:  # another one decides itself what a model is
        local_folder(model)
    # torch's own type by name: this process need not import torch.
    known = isinstance(device, str) or (type(device).__module__, type(device).__name__) == ("torch", "device")
    if device is not None and not (known and str(device)):
        raise InputError(f"device must be a name, a torch.device or None, got {device!r}")
    if not isinstance(max_in_flight, int) or isinstance(max_in_flight, bool) or max_in_flight < 1:
        raise InputError(f"max_in_flight must be a whole number of at least 1, got {max_in_flight!r}")
    number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not (number and 0 < timeout_s <= MAX_TIMEOUT_S):
        raise InputError(
            f"timeout_s must be a number of seconds, above 0 and at most {MAX_TIMEOUT_S}, got {timeout_s!r}"
        )
    if attention_backend is not None and not isinstance(attention_backend, str):
        raise InputError(f"attention_backend must be a name or None, got {attention_backend!r}")
    return SessionSpec(
        model=os.fspath(model) if isinstance(model, os.PathLike) else model,
        config=config,
        dtype=setting(dtype),
        device=None if device is None else str(device),
        max_in_flight=max_in_flight,
        timeout_s=float(timeout_s),
        session=session,
        attention_backend=attention_backend,
        options=options,
    )
