"""What a pipeline is made of, and what may not be done to it when it is sharded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shardit.core.comm.collectives import Collectives
from shardit.core.comm.mesh import Mesh
from shardit.core.modules.patching import subclass_in_place
from shardit.errors import InputError, UnsupportedError
from shardit.mixins import CFGParallelMixin

OFFLOAD = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
SAVE = ("save_pretrained",)
BEFORE = ("load_textual_inversion", "unload_textual_inversion", "enable_free_noise", "disable_free_noise")
"""Methods of pipelines that make modules of the values of others, of which a rank has a part alone."""
BEFORE_ON_MODULES = ("resize_token_embeddings", "set_input_embeddings")
"""The same of models."""

CACHES = (
    "FirstBlockCacheConfig",
    "TaylorSeerCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "FasterCacheConfig",
    "MagCacheConfig",
)
"""Step caches of diffusers that do the same on every tensor rank: they go by the step, or by what all ranks have."""


def components_of(target: Any) -> dict[str, nn.Module] | None:
    """The modules of a pipeline by name, the outermost ones; None for a module that is to be sharded by itself.

    A pipeline has `components` (as those of diffusers have), or its modules are its attributes. Raises InputError
    where there are none.
    """
    modules = modules_of(target)
    return None if modules is None else outermost(modules)


def modules_of(target: Any) -> dict[str, nn.Module] | None:
    """As `components_of`, with modules that are parts of others, and each under all of its names: this looks into none
    of them."""
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
    """Components without those that another one has as a part, and each under one name."""
    parts = {id(part) for module in modules.values() for part in module.modules() if part is not module}
    once: dict[int, str] = {}
    for name, module in modules.items():
        if id(module) not in parts:
            once.setdefault(id(module), name)
    return {name: modules[name] for name in once.values()}


def shared_tensors(modules: dict[str, nn.Module]) -> dict[int, tuple[str, ...]]:
    """The tensors that several components have (a ControlNet that uses embedders of the transformer): their ids, and
    the names of those components."""
    found: dict[int, list[str]] = {}
    for name, module in modules.items():
        for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}:
            found.setdefault(tensor, []).append(name)
    return {tensor: tuple(names) for tensor, names in found.items() if len(names) > 1}


def device_of(modules: dict[str, nn.Module]) -> torch.device:
    """Where the modules are."""
    parameter = next((p for module in modules.values() for p in module.parameters()), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def refuse_hooks(modules: dict[str, nn.Module], mesh: Mesh) -> None:
    """Raise UnsupportedError for what cannot be kept when modules are sharded."""
    for name, module in modules.items():
        if getattr(module, "is_cache_enabled", False):
            check_cache(mesh, getattr(module, "_cache_config", None), name)
        elif any(getattr(hook, "_is_stateful", False) for hook in _hooks(module)):
            raise UnsupportedError(f"{name} has hooks that keep state: use enable_cache() where they are a step cache")
        if any(hasattr(part, "_hf_hook") for part in module.modules()) or "GroupOffloadingHook" in _kinds(module):
            raise UnsupportedError(f"{name} is offloaded: load the pipeline without CPU offload before parallelize")
        strange = next((p for p in module.parameters() if type(p) is not nn.Parameter), None)
        packed = next((p for p in module.modules() if "quantized" in type(p).__module__), None)
        if strange is not None or packed is not None or getattr(module, "hf_quantizer", None) is not None:
            what = type(packed if strange is None else strange).__name__
            raise UnsupportedError(f"{name} has quantized weights ({what}): load it without quantization")


def _hooks(module: nn.Module) -> list[Any]:
    """Hooks of diffusers on a module and on all below it."""
    registries = [getattr(part, "_diffusers_hook", None) for part in module.modules()]
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]


def _kinds(module: nn.Module) -> set[str]:
    return {type(hook).__name__ for hook in _hooks(module)}


def check_cache(mesh: Mesh, config: Any, name: str) -> None:
    """Raise UnsupportedError where ranks would come to decide differently: caches decide from data, or keep it, and
    under stages, guidance ranks and sharded tokens a rank has a part of that only."""
    for size, axis in ((mesh.pp_size, "stages"), (mesh.sizes["cfg"], "guidance ranks")):
        if size > 1:
            raise UnsupportedError(f"{name}: a step cache does not work over {axis}: call disable_cache()")
    if "sp" in mesh.axes:
        raise UnsupportedError(f"{name}: a step cache does not work over sharded tokens: call disable_cache()")
    if type(config).__name__ not in CACHES:
        known = ", ".join(kind.removesuffix("Config") for kind in CACHES)
        raise UnsupportedError(f"{name}: {type(config).__name__} does not work over tensor ranks; {known} do")


def guard(module: Any, name: str, mesh: Mesh) -> None:
    """Let the methods of a component that would do something else than they say raise UnsupportedError, in place."""
    members: dict[str, Any] = {method: refused(method) for method in (*OFFLOAD, *SAVE) if hasattr(module, method)}
    members |= {method: refused(method) for method in BEFORE_ON_MODULES if hasattr(module, method)}
    own_enable = getattr(type(module), "enable_cache", None)
    if own_enable is not None or hasattr(module, "shardit_stages"):

        def enable_cache(self: Any, config: Any) -> None:
            check_cache(mesh, config, name)
            if own_enable is None:
                raise UnsupportedError(f"diffusers has no step caches for {name}")
            own_enable(self, config)
            _decide_together(self, mesh)

        members["enable_cache"] = enable_cache
    if getattr(module, "is_cache_enabled", False):
        _decide_together(module, mesh)
    subclass_in_place(module, members)


def _decide_together(model: nn.Module, mesh: Mesh) -> None:
    """What a cache decides from data: it computes where any tensor rank would, so that all stay in step."""
    if "tp" not in mesh.axes:
        return
    ranks = Collectives(mesh.axes["tp"])
    for hook in _hooks(model):
        own_decision = getattr(hook, "_should_compute_remaining_blocks", None)
        if own_decision is not None:
            hook._should_compute_remaining_blocks = functools.partial(_any_rank, ranks, own_decision)


def _any_rank(ranks: Collectives, decide: Callable[[torch.Tensor], bool], residual: torch.Tensor) -> bool:
    return bool(ranks.all_reduce(torch.tensor([float(decide(residual))], device=ranks.group.device)).item())


def refused(name: str) -> Callable[..., None]:
    """A method that raises UnsupportedError."""
    what = "cannot be combined with several ranks: each holds only its own part"
    advice = "; save it before parallelize" if name in SAVE else ""
    advice = "; do it before parallelize" if name in (*BEFORE, *BEFORE_ON_MODULES) else advice

    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(f"{name} {what}{advice}")

    return method
