"""Cases of `generate` for each family, and the comparison with one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from shardit import InputError
from tests.language.families import VOCABULARY


@dataclass(frozen=True)
class Case:
    """A call of `generate`. padded: the first prompt of the batch has three tokens of padding on its left."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    length: int = 9
    padded: bool = False

    def __call__(self, model: Any) -> Any:
        """Generate with a model; the output has the logits of each step."""
        ids = torch.randint(3, VOCABULARY, (2, self.length), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        if self.padded:
            ids[0, :3] = mask[0, :3] = 0
        torch.manual_seed(3)
        options = {"max_new_tokens": 6, "do_sample": False, **self.options}
        return model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)


CASES = (
    Case("greedy"),
    Case("again"),
    Case("longer", length=13),
    Case("no cache", {"use_cache": False}),
    Case("sampling", {"do_sample": True, "top_k": 20, "top_p": 0.9}),
    Case("beams", {"num_beams": 3}),
    Case("padded", padded=True),
    Case("static cache", {"cache_implementation": "static", "disable_compile": True}),
    Case("hidden states", {"output_hidden_states": True}),
)


def compare(plain: Any, sharded: Any, case: Case, close: float = 0.0) -> str:
    """Return "right", "not on one rank" or "WRONG"; errors of the sharded model are raised. close: maximum relative
    distance of logits and hidden states; 0 for equal bits. Tokens must always be equal."""
    try:
        expected = case(plain)
    except Exception:
        return "not on one rank"
    got = case(sharded)
    same = torch.equal(expected.sequences, got.sequences) and alike(expected.logits, got.logits, close)
    return "right" if same and alike(expected.hidden_states, got.hidden_states, close) else "WRONG"


def alike(expected: Any, got: Any, close: float = 0.0) -> bool:
    """Return whether nested tuples of tensors are equal, or within the relative distance `close`."""
    if isinstance(expected, (tuple, list)):
        return len(expected) == len(got) and all(alike(a, b, close) for a, b in zip(expected, got, strict=True))
    if expected is None or not close:
        return got is expected or (type(got) is torch.Tensor and torch.equal(expected, got))
    return expected.shape == got.shape and bool((expected - got).norm() <= close * expected.norm())


def errors_of(mistakes: dict[str, Callable[[], Any]]) -> dict[str, str | None]:
    """Return the text of the InputError that each call raises, None if it raises none."""
    found: dict[str, str | None] = {}
    for name, call in mistakes.items():
        try:
            call()
            found[name] = None
        except InputError as error:
            found[name] = str(error)
    return found
