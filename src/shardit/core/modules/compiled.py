"""Wrappers of torch.compile, compiled calls of modules, and operations that it does not look into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from shardit.errors import UnsupportedError

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILED = "_orig_mod"
"""Name of the module in the wrapper that torch.compile returns."""
BLOCKWISE = "call compile_repeated_blocks() on it instead"
"""Advice for models of diffusers that several ranks run together."""


def unwrap(module: Any) -> tuple[Any, Any]:
    """Return the module in a wrapper of torch.compile, and its compiler; the module itself and None if there is no
    wrapper."""
    found = getattr(module, "_modules", {}).get(COMPILED)
    return (module, None) if found is None else (found, getattr(module, "dynamo_ctx", None))


def unwrap_parts(model: nn.Module) -> None:
    """Remove wrappers of torch.compile around parts of a model, in place, and compile the calls of the parts instead:
    names and interceptors of the parts then stay in effect."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            part, compiler = unwrap(child)
            if compiler is not None:
                parent._modules[name] = part
                compile_call(part, compiler)


def compile_call(module: nn.Module, compiler: Any) -> None:
    """Compile the calls of a module, as `module.compile()` does, with an existing compiler and its settings."""
    module._compiled_call_impl = compiler(module._call_impl)


def never_compiled(function: Function) -> Function:
    """Return a function that compiled code calls without looking into it."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


_library = torch.library.Library("shardit", "FRAGMENT")  # operations exist as long as this
_effects: Any = getattr(_library, "_register_effectful_op", None)


def define_operation(schema: str, run: Callable[..., Any], describe: Callable[..., Any]) -> bool:
    """Define `torch.ops.shardit.<name>`, without gradients, and return whether graphs can contain it; if not (an older
    torch), callers break the graph.

    schema: of torch, with the name. describe: returns results of the same shapes, dtypes and strides, without data.
    Messages are an effect: a graph keeps the order of these operations, and those whose results nothing reads.
    """
    if _effects is None:
        return False
    name = f"shardit::{schema.partition('(')[0]}"
    _library.define(schema, tags=(torch.Tag.cudagraph_unsafe,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, describe, lib=_library)
    _effects(name, torch.library.EffectType.ORDERED)  # pyright: ignore[reportPrivateImportUsage]
    return True


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Temporarily run the code of a module as it is. Code that torch.compile meets while a mode sees each operation
    would never be compiled again."""
    compiled = [(part, part._compiled_call_impl) for part in module.modules() if part._compiled_call_impl is not None]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call


def compiled_around(model: nn.Module, blocks: Iterable[nn.Module]) -> str | None:
    """Return the name of a module whose compiled call contains calls of blocks; None if there is none."""
    inside = {id(block) for block in blocks}
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None or unwrap(module)[1] is not None
        if compiled and any(id(one) in inside for one in module.modules() if one is not module):
            return name or type(model).__name__
    return None


def refuse_compiled(name: str, model: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Raise UnsupportedError if the whole `model`, or one of the parts, is compiled: its forward waits for other
    ranks."""
    if any(getattr(part, "_compiled_call_impl", None) is not None for part in (model, *parts)):
        advice = BLOCKWISE if hasattr(model, "compile_repeated_blocks") else "leave it uncompiled"
        raise UnsupportedError(
            f"{name} is compiled, but several ranks run it together, which one compiled function cannot do: {advice}"
        )


def refuse_compiling(name: str, compiling: bool) -> None:
    """Raise UnsupportedError in a call from a function that torch.compile traces; `compiling`:
    `torch.compiler.is_compiling()` in the caller's frame, since this function is never traced."""
    if compiling:
        raise UnsupportedError(
            f"{name} is called from compiled code, but several ranks take part in it, which one compiled function "
            "cannot do: leave that uncompiled"
        )


refuse_compiling._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
