"""Changes of a sharded component after it was sharded: applied if that is possible, refused otherwise.

Changes are the same on every rank, so all ranks reach the same decision here without communication.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from shardit.core.comm.collectives import Collectives
from shardit.core.modules.compiled import refuse_compiled
from shardit.core.modules.fingerprint import CLASS, FORWARD, PROCESSOR, Change
from shardit.core.modules.patching import hides, is_numbered
from shardit.errors import UnsupportedError
from shardit.parallel.tensor.adapters import cut_adapters

if TYPE_CHECKING:
    from shardit.diffusion.sharding.component_sharding import ComponentSharding


def cut_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a model whose calls are intercepted, by name."""
    stages, sequence = (getattr(model, name, None) for name in ("shardit_stages", "shardit_sequence"))
    return [*getattr(getattr(stages, "cut", None), "blocks", ()), *getattr(sequence, "blocks", ())]


def apply_changes(sharding: ComponentSharding, changes: list[Change]) -> None:
    """Apply changes of a component to its sharded parts. Raises UnsupportedError if that is not possible."""
    model: Any = sharding.module
    if sharding.denoises:
        refuse_compiled(sharding.title, model, ())
        for name, block in cut_blocks(model):
            _same_module(sharding, name, block)
        _own_interceptors(sharding)
    layerwise = getattr(model, "shardit_layerwise", None)
    if layerwise is not None:
        refuse_compiled(sharding.title, model, model.modules())
        for name, unit in layerwise.units:
            _same_module(sharding, name, unit)
    parts = dict(model.named_modules(remove_duplicate=False)) if changes else {}
    for change in changes:
        _refuse_hidden(sharding, change, parts.get(change.module))
    if sharding.slices is not None:
        _apply_to_slices(sharding, changes)
    for name in ("shardit_stages", "shardit_sequence", "shardit_overlap"):
        known = getattr(model, name, None)
        if known is not None:
            known.forget()


def _same_module(sharding: ComponentSharding, name: str, module: nn.Module) -> None:
    now: Any = sharding.module
    for part in name.split("."):
        now = getattr(now, part, None)
    if now is not module:
        raise UnsupportedError(
            f"{sharding.title}.{name} was replaced after parallelize, by a module that all ranks would run whole: "
            "replace it before"
        )


def _own_interceptors(sharding: ComponentSharding) -> None:
    """Raise UnsupportedError if a new class of a block has no interceptor for it."""
    for name, block in cut_blocks(sharding.module):
        if not is_numbered(block):
            raise UnsupportedError(
                f"{sharding.title}.{name} was given another class after parallelize, which does not communicate with "
                "other ranks: do it before, or derive the class from type() of the block"
            )


def _refuse_hidden(sharding: ComponentSharding, change: Change, module: nn.Module | None) -> None:
    """Raise UnsupportedError if an interceptor hides the new member of a module's class, or is lost. module: None for a
    processor."""
    if module is not None and change.home is not None and hides(type(module), change.home, change.name):
        raise UnsupportedError(
            f"{sharding.title}{'.' if change.module else ''}{change.module}: the {change.name} of its class was "
            "replaced after parallelize, but ranks share its calls, with the one before: replace it before parallelize"
        )


def _apply_to_slices(sharding: ComponentSharding, changes: list[Change]) -> None:
    """Apply changes next to sliced linears. Only LoRA and attention processors are allowed, which tensor parallelism
    handles itself. Raises UnsupportedError for all others."""
    assert sharding.slices is not None
    cut = {name.rpartition(".")[0] for name in sharding.slices.cuts} | set(sharding.slices.roles)
    places = {name.rpartition(".")[0].rpartition(".")[0] for name in sharding.slices.cuts}
    own = cut | set(sharding.slices.units)
    for change in changes:
        if change.name in ((CLASS,) if change.home is None else (FORWARD, "__call__")) and change.module in own:
            raise UnsupportedError(
                f"{sharding.title}.{change.path} was changed after parallelize, but tensor ranks run a part of it in "
                "their own way: do it before parallelize, or use tensor_parallel_size=1"
            )
        if change.name == FORWARD and change.home is None and change.now is not None and change.module in cut:
            _refuse_own_forward(sharding, change)
        if change.name in sharding.slices.attributes.get(change.module, ()):
            raise UnsupportedError(
                f"{sharding.title}.{change.path} was changed after parallelize, but tensor ranks have set it to their "
                "own part: set it before parallelize, or use tensor_parallel_size=1"
            )
        inside = change.module in places or any(f"{place}.".startswith(f"{change.path}.") for place in places)
        here = inside and change.name != PROCESSOR and isinstance(change.now, nn.Module)
        if here and not _adapted(change):
            raise UnsupportedError(
                f"{sharding.title}.{change.path} became {type(change.now).__name__} after parallelize, next to linears "
                "that are cut over tensor ranks: do it before parallelize, or use tensor_parallel_size=1"
            )
    checks = getattr(sharding.module, "shardit_checks", None)
    if checks is not None:
        checks.forget()
    cut_adapters(sharding.module, sharding.slices, Collectives(sharding.runtime.mesh.axes["tp"]))


def _refuse_own_forward(sharding: ComponentSharding, change: Change) -> None:
    """Raise UnsupportedError for a forward that replaces that of a sliced module (some LoRA loaders do so), unless a
    hook of diffusers or accelerate set it, which still calls the original."""
    module = _base(sharding.module.get_submodule(change.module))  # an adapter may wrap it by now
    if not (hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook")):
        raise UnsupportedError(
            f"{sharding.title}.{change.path} was replaced after parallelize, but tensor ranks add up their parts "
            "there: use a forward hook, or tensor_parallel_size=1"
        )


def _adapted(change: Change) -> bool:
    """Return whether an adapter around a linear was added or removed."""
    return _base(change.before) is _base(change.now)


def _base(module: Any) -> Any:
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module
