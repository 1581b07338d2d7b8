"""Finds the heights and widths that a pipeline takes by trying the pipeline itself, not from a list of models."""

from __future__ import annotations

import copy
import inspect
import logging
from types import SimpleNamespace
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from shardit.diffusion.request.size_search import SIDE, found_least_sides, search

_AFTER_THE_CHECKS = ("encode", "_encode", "prepare", "_prepare", "get_", "_get_")
"""Prefixes of the methods that pipelines call after the checks of their arguments."""

_OF_ALL = frozenset(dir(DiffusionPipeline))
"""Methods of all pipelines, which some call before."""


def size_multiples(pipe: Any) -> dict[str, int]:
    """Return the numbers that height and width must be multiples of, by name; empty if the pipeline takes any, rounds
    them itself, or cannot be tried (it consists of other pipelines, whose calls would run)."""
    if any(
        isinstance(part, ConfigMixin) and hasattr(part, "components") for part in getattr(pipe, "__dict__", {}).values()
    ):
        return {}
    return search(lambda height, width: _takes(pipe, height, width))


def least_sides(pipe: Any) -> dict[str, int]:
    """Return the least height and width that leave latents, by name; empty if the pipeline does not show them."""
    return found_least_sides(vars(pipe), inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters)


class _Checked(Exception):
    """The pipeline has passed its checks."""


def _takes(pipe: Any, height: int, width: int) -> bool:
    """Return whether the pipeline's call passes its own checks of a size. No model runs."""
    call = inspect.unwrap(type(pipe).__call__)  # without the wrapper of a parallel pipeline
    names = inspect.signature(call).parameters
    if not {"height", "width"} <= names.keys():
        return False
    image = Image.new("RGB", (SIDE, SIDE))
    given = {"prompt": "a", "image": image, "mask_image": image, "height": height, "width": width}
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        call(_without_components(pipe), **{name: value for name, value in given.items() if name in names})
    except ValueError:
        return False
    except Exception:  # it reached its components, which are not there
        return True
    finally:
        log.setLevel(level)
    return True


def _without_components(pipe: Any) -> Any:
    """Copy the pipeline with components that have only a configuration."""

    def checked(*_: Any, **__: Any) -> None:
        raise _Checked

    probe = copy.copy(pipe)
    for name, part in pipe.components.items():
        if hasattr(part, "config"):
            probe.__dict__[name] = SimpleNamespace(config=part.config)
    for name in dir(type(pipe)):
        if name.startswith(_AFTER_THE_CHECKS) and callable(getattr(type(pipe), name)) and name not in _OF_ALL:
            probe.__dict__[name] = checked
    return probe
