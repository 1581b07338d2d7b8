"""The roles of a pipeline's components, found by their classes and names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from shardit.core.modules.patching import plain_class
from shardit.core.placement.roles import Roles
from shardit.diffusion.class_homes import CUT_PACKAGES, ENCODERS, VAE_PACKAGE

CUT_NAMES = ("transformer", "unet", "denoiser", "dit")
"""Prefixes of the names of denoising components whose classes belong to a user or a pipeline."""

LIBRARIES = ("builtins.", "abc.", "typing.", "torch.", "transformers.", "diffusers.", "huggingface_hub.")
"""Modules of base classes with which a component may still be cut if it is no denoiser."""


def denoises(name: str, module: nn.Module) -> bool:
    """Return whether a component is called in every step, and so is cut: one of diffusers' classes that denoise, or
    derived from one; or another class, by its name in the pipeline or because `_sp_plan` declares how its tokens are
    split."""
    theirs = any(base.__module__.startswith(CUT_PACKAGES) for base in type(module).__mro__)
    own = not (is_vae(module) or type(module).__module__.startswith(ENCODERS))
    return theirs or getattr(module, "_sp_plan", None) is not None or (own and name.startswith(CUT_NAMES))


def is_vae(module: nn.Module) -> bool:
    """Return whether a component is of one of diffusers' classes of VAEs, or derived from one."""
    return any(base.__module__.startswith(VAE_PACKAGE) for base in type(module).__mro__)


def encodes(module: nn.Module) -> bool:
    """Return whether a component is of one of transformers' classes, or derived from one: an encoder, unless it
    `denoises`."""
    return any(base.__module__.startswith(ENCODERS) for base in type(module).__mro__) and not is_vae(module)


def own_code(module: nn.Module) -> type | None:
    """Return the class of a component, or one that it is derived from, that has methods and comes from no library: they
    may read any of its weights."""
    for cls in plain_class(module).__mro__:
        own = not f"{cls.__module__}.".startswith(LIBRARIES)
        if own and any(inspect.isroutine(value) or isinstance(value, property) for value in vars(cls).values()):
            return cls
    return None


def branches(pipeline_class: type) -> int:
    """Micro-batches that one request of a pipeline can have in flight: 2 if it takes a negative prompt (guidance in
    two calls, or in one batched call that is split), else 1."""
    call = pipeline_class.forward if issubclass(pipeline_class, nn.Module) else pipeline_class.__call__
    return 2 if "negative_prompt" in inspect.signature(call).parameters else 1


def left_whole(module: nn.Module) -> str | None:
    """Return the reason not to cut an encoder of any size; None if there is none."""
    cls = own_code(module) if encodes(module) else None
    return f"{cls.__name__} has methods of its own, which may read any of its weights" if cls else None


def roles_of(modules: Mapping[str, nn.Module], pipeline_class: type | None = None) -> Roles:
    """Return the roles of the components of a pipeline; without a pipeline class those of components by themselves."""
    title = pipeline_class.__name__ if pipeline_class is not None else "the model"
    vaes = {name: type(module) for name, module in modules.items() if is_vae(module)}
    tiled = tuple(name for name, kind in vaes.items() if any("tiled_decode" in method for method in dir(kind)))
    names = " and ".join(sorted(kind.__name__ for kind in vaes.values()))
    no_tiles = f"{names} of {title} cannot decode in tiles" if names else f"{title} has no VAE of diffusers' classes"
    return Roles(
        title,
        stepped=frozenset(name for name, module in modules.items() if denoises(name, module)),
        encoders=frozenset(name for name, module in modules.items() if encodes(module)),
        whole={name: why for name, module in modules.items() if (why := left_whole(module))},
        vaes=frozenset(vaes),
        tiled=tiled,
        no_tiles="" if tiled else no_tiles,
        branches=branches(pipeline_class) if pipeline_class is not None else 1,
    )
