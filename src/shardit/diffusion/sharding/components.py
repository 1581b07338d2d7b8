"""Components of a pipeline, and the operations that are refused once it is sharded."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shardit.core.comm.collectives import Collectives
from shardit.core.comm.mesh import Mesh
from shardit.core.modules.absent import partial_state_dict
from shardit.core.modules.patching import subclass_in_place
from shardit.diffusion.family import LIBRARIES
from shardit.errors import InputError, UnsupportedError
from shardit.mixins import CFGParallelMixin

OFFLOAD = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
SAVE = ("save_pretrained",)
BEFORE_PARALLELIZE = ("load_textual_inversion", "unload_textual_inversion", "enable_free_noise", "disable_free_noise")
"""Methods of pipelines that create modules from the values of others, of which each rank has only a part."""
BEFORE_PARALLELIZE_ON_MODULES = ("resize_token_embeddings", "set_input_embeddings")
"""Such methods of models."""

CACHES = (
    "FirstBlockCacheConfig",
    "TaylorSeerCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "FasterCacheConfig",
    "MagCacheConfig",
)
"""Step caches of diffusers that decide equally on every tensor rank: by the step, or by data that all ranks have."""


def components_of(target: Any) -> dict[str, nn.Module] | None:
    """Return the outermost modules of a pipeline by name; None for a module that is sharded without a pipeline.

    A pipeline has `components` (as in diffusers), or its modules are its attributes. Raises InputError if it has no
    modules.
    """
    modules = modules_of(target)
    return None if modules is None else outermost(modules)


def modules_of(target: Any) -> dict[str, nn.Module] | None:
    """Return the modules of `components_of`, including parts of others, each under all of its names: submodules are not
    read."""
    if isinstance(target, nn.Module) and not isinstance(target, CFGParallelMixin):
        return None
    found = getattr(target, "components", None)
    if not isinstance(found, dict):
        found = dict(target.named_children()) if isinstance(target, nn.Module) else getattr(target, "__dict__", {})
    modules = {name: part for name, part in found.items() if isinstance(part, nn.Module)}
    if not modules:
        raise InputError(f"parallelize takes a module or a pipeline that has modules, not {type(target).__name__}")
    return modules


def outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return components without those that are parts of another, each under one name."""
    parts = {id(part) for module in modules.values() for part in module.modules() if part is not module}
    once: dict[int, str] = {}
    for name, module in modules.items():
        if id(module) not in parts:
            once.setdefault(id(module), name)
    return {name: modules[name] for name in once.values()}


def shared_tensors(modules: dict[str, nn.Module]) -> dict[int, tuple[str, ...]]:
    """Return the tensors that several components share (a ControlNet that uses embedders of the transformer): id ->
    names of the components."""
    found: dict[int, list[str]] = {}
    for name, module in modules.items():
        for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}:
            found.setdefault(tensor, []).append(name)
    return {tensor: tuple(names) for tensor, names in found.items() if len(names) > 1}


def device_of(modules: dict[str, nn.Module]) -> torch.device:
    """Return the device of the modules."""
    parameter = next((p for module in modules.values() for p in module.parameters()), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def refuse_hooks(modules: dict[str, nn.Module], mesh: Mesh) -> None:
    """Raise UnsupportedError for hooks and weights that sharding cannot preserve."""
    for name, module in modules.items():
        if getattr(module, "is_cache_enabled", False):
            check_cache(mesh, getattr(module, "_cache_config", None), name)
        elif any(getattr(hook, "_is_stateful", False) for hook in _hooks(module)):
            raise UnsupportedError(f"{name} has hooks that keep state: use enable_cache() if they are a step cache")
        if any(hasattr(part, "_hf_hook") for part in module.modules()) or "GroupOffloadingHook" in _kinds(module):
            raise UnsupportedError(f"{name} is offloaded: load the pipeline without CPU offload before parallelize")
        strange = next((p for p in module.parameters() if type(p) is not nn.Parameter), None)
        packed = next((p for p in module.modules() if "quantized" in type(p).__module__), None)
        if strange is not None or packed is not None or getattr(module, "hf_quantizer", None) is not None:
            kind = type(packed if strange is None else strange).__name__
            raise UnsupportedError(f"{name} has quantized weights ({kind}): load it without quantization")


def _hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of diffusers on a module and its submodules."""
    registries = [getattr(part, "_diffusers_hook", None) for part in module.modules()]
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]


def _kinds(module: nn.Module) -> set[str]:
    return {type(hook).__name__ for hook in _hooks(module)}


def check_cache(mesh: Mesh, config: Any, name: str) -> None:
    """Raise UnsupportedError if ranks could decide differently: caches read or keep data, and with stages, guidance
    ranks and sharded tokens each rank has only a part of it."""
    for size, axis in ((mesh.pp_size, "stages"), (mesh.sizes["cfg"], "guidance ranks")):
        if size > 1:
            raise UnsupportedError(f"{name}: a step cache does not work over {axis}: call disable_cache()")
    if "sp" in mesh.axes:
        raise UnsupportedError(f"{name}: a step cache does not work over sharded tokens: call disable_cache()")
    if type(config).__name__ not in CACHES:
        known = ", ".join(kind.removesuffix("Config") for kind in CACHES)
        raise UnsupportedError(f"{name}: {type(config).__name__} does not work over tensor ranks; {known} do")


def refuse_methods(module: Any, name: str, mesh: Mesh) -> None:
    """Make methods that cannot work on a sharded component raise UnsupportedError, in place."""
    members: dict[str, Any] = {method: refused(method) for method in (*OFFLOAD, *SAVE) if hasattr(module, method)}
    members |= {method: refused(method) for method in BEFORE_PARALLELIZE_ON_MODULES if hasattr(module, method)}
    if not hasattr(module, "shardit_boundary"):  # which sends the values of what one rank owns
        members["state_dict"] = partial_state_dict(type(module).state_dict, LIBRARIES)
    members["__reduce_ex__"] = unpicklable(type(module))
    if any(parameter.is_meta for parameter in module.parameters()):
        # `apply_group_offloading` reads it before it sets the first hook, and nothing else of diffusers does.
        members["_group_offload_block_modules"] = property(refused("group offloading"))
    own_enable = getattr(type(module), "enable_cache", None)
    if own_enable is not None or hasattr(module, "shardit_stages"):

        def enable_cache(self: Any, config: Any) -> None:
            check_cache(mesh, config, name)
            if own_enable is None:
                raise UnsupportedError(f"diffusers has no step caches for {name}")
            own_enable(self, config)
            _share_decision(self, mesh)

        members["enable_cache"] = enable_cache
    if getattr(module, "is_cache_enabled", False):
        _share_decision(module, mesh)
    subclass_in_place(module, members)


def _share_decision(model: nn.Module, mesh: Mesh) -> None:
    """Share the decision of a cache between tensor ranks: all compute the remaining blocks if any rank would."""
    if "tp" not in mesh.axes:
        return
    ranks = Collectives(mesh.axes["tp"])
    for hook in _hooks(model):
        own_decision = getattr(hook, "_should_compute_remaining_blocks", None)
        if own_decision is not None:
            hook._should_compute_remaining_blocks = functools.partial(_any_rank, ranks, own_decision)


def _any_rank(ranks: Collectives, decide: Callable[[torch.Tensor], bool], residual: torch.Tensor) -> bool:
    return bool(ranks.all_reduce(torch.tensor([float(decide(residual))], device=ranks.group.device)).item())


def unpicklable(cls: type) -> Callable[..., Any]:
    """Return a `__reduce_ex__` for sharded objects: `copy.copy` uses it, pickle and `copy.deepcopy` are refused."""
    own: Any = cls.__reduce_ex__

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        caller = sys._getframe(1)
        copies = caller.f_globals.get("__name__") == "copy"
        if copies and caller.f_code.co_name == "copy":
            return own(self, protocol)
        how, instead = ("deep-copied", "copy") if copies else ("pickled", "save")
        raise UnsupportedError(
            f"{cls.__name__} cannot be {how}: each rank holds only its own part; {instead} it before parallelize"
        )

    return __reduce_ex__


def refused(name: str) -> Callable[..., None]:
    """Return a method that raises UnsupportedError."""
    reason = "cannot be combined with several ranks: each holds only its own part"
    advice = "; save it before parallelize" if name in SAVE else ""
    advice = "; do it before parallelize" if name in (*BEFORE_PARALLELIZE, *BEFORE_PARALLELIZE_ON_MODULES) else advice

    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(f"{name} {reason}{advice}")

    return method
