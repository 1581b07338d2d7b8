"""Sizes on modules: attributes, or entries of a configuration ("config.NAME")."""

from __future__ import annotations

from typing import Any


class OwnNumbers:
    """A configuration of which a module has some numbers of its own; all else is that of the model."""

    def __init__(self, config: Any, numbers: dict[str, int]):
        vars(self).update(numbers)
        vars(self)["shardit_config"] = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "shardit_config":
            raise AttributeError(name)
        return getattr(self.shardit_config, name)


def number_at(module: Any, attribute: str) -> Any:
    """The value of an attribute of a module, or of one that its configuration has; None if there is none."""
    holder, _, name = attribute.rpartition(".")
    return getattr(vars(module).get(holder), name, None) if holder else vars(module).get(name)


def set_number(module: Any, attribute: str, value: int) -> None:
    """Set it for this module alone."""
    holder, _, name = attribute.rpartition(".")
    if not holder:
        setattr(module, name, value)
        return
    config = getattr(module, holder)
    if not isinstance(config, OwnNumbers):
        config = OwnNumbers(config, {})
        setattr(module, holder, config)
    vars(config)[name] = value
