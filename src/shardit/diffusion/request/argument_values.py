"""Checks values of a pipeline's own arguments, which have no field of their own, by the types of their defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from shardit.config import reject_unknown_names
from shardit.errors import InputError
from shardit.settings.checks import is_number, number, number_problem, text_as_flag

if TYPE_CHECKING:
    from shardit.diffusion.request.pipeline_signature import PipelineSignature

_BOOLS_OR_NUMBERS = ("cfg_normalization",)
"""Z-Image takes its limit of a norm as a number, too, although the default is False."""


def checked_value(name: str, value: Any, takes: PipelineSignature) -> Any:
    """Return the value of an argument, a text such as "off" as a bool if the default is one, and a list as a tuple if
    the pipeline takes one. Raises InputError.

    In Python any text is true, so that "false" would silently enable an argument. If the default is a number, None has
    another meaning in some pipelines, and is passed on.
    """
    if name in takes.tuples and value is not None:
        return _tuple(name, value, takes.tuples[name])
    if name in takes.text_lists and value is not None:
        if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) for part in value):
            raise InputError(f'{name} must be a list of texts, such as ["a", "b"], got {_short(value)}')
        return list(value)
    if name in takes.number_keys and isinstance(value, Mapping):
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: one for key, one in value.items()}
    default = takes.defaults.get(name)
    if isinstance(default, bool):
        flag = text_as_flag(value)
        if type(flag).__name__ in ("bool", "bool_"):  # of numpy
            flag = bool(flag)
        if not isinstance(flag, bool) and not (name in _BOOLS_OR_NUMBERS and is_number(flag) and flag >= 0):
            raise InputError(f"{name} must be true or false, got {_short(value)}")
        return flag
    if isinstance(default, (int, float)):
        parts = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(part, (str, bytes, bool, Mapping)) for part in parts):
            raise InputError(f"{name} must be a number, got {_short(value)}")
        if wrong := next(filter(None, (number_problem(part) for part in parts if isinstance(part, Real))), None):
            raise InputError(f"{name} must be {wrong}, got {_short(value)}")
    known = takes.forms.get(name) if name not in takes.images else None
    form = _form(value)
    if form is not None and known and form not in known:
        raise InputError(f"{name} must be {' or '.join(_FORMS[one] for one in known)}, got {_short(value)}")
    return value


_FORMS = {"number": "a number", "flag": "true or false", "text": "a text", "list": "a list", "dict": "a dict of names"}


def _form(value: Any) -> str | None:
    """Return the form of a value that JSON may have; None for null and all others."""
    of_types = {bool: "flag", Real: "number", str: "text", list: "list", tuple: "list", Mapping: "dict"}
    return next((form for kind, form in of_types.items() if isinstance(value, kind)), None)


def _tuple(name: str, value: Any, length: int) -> tuple[Any, ...]:
    sized = isinstance(value, (list, tuple)) and (len(value) == length or not length)
    if not sized or any(not is_number(part) for part in value):
        form = json.dumps(list(range(length))) if length else "[1, 2, ...]"
        raise InputError(f"{name} must be {length or 'some'} numbers, such as {form}, got {_short(value)}")
    return tuple(value)


_OF_ADAPTER = ("ip_adapter_masks", "ip_hidden_states")
_TENSORS = (*_OF_ADAPTER, "attention_mask")
ATTENTION_NAMES = ("scale", "gligen", *_TENSORS)
"""Names that models and attention processors of diffusers read from `attention_kwargs`; most ignore any other name."""


def check_attention(name: str, value: Any, adapted: bool) -> None:
    """Raise InputError for names in `attention_kwargs` (or joint_, cross_) that nobody takes, and for values of another
    type. adapted: whether the model has an IP-Adapter, which some of the names are for."""
    if not name.endswith("attention_kwargs") or not isinstance(value, Mapping):
        return
    reject_unknown_names(name, value, ATTENTION_NAMES)
    for key, one in value.items():
        if key in _OF_ADAPTER and not adapted:
            raise InputError(f"{name}: {key} has no effect without an IP-Adapter, which this model lacks; leave it out")
        if key == "scale":
            number()(f"{name}: scale", one)
        if key == "gligen" and not isinstance(one, Mapping):
            raise InputError(f"{name}: gligen must be a dict, got {_short(one)}")
        parts = one if isinstance(one, (list, tuple)) else [one]
        if key in _TENSORS and not all(hasattr(part, "shape") for part in parts):
            raise InputError(
                f"{name}: {key} must be a tensor or a list of tensors, got {_short(one)}; give one to shardit.Omni, or "
                "leave it out"
            )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
