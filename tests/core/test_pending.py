"""Pending tensors: operations that wait, operations that do not, and the state afterwards."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shardit.core.runtime.pending import PendingSource, PendingTensor, materialize

VALUES = torch.arange(24.0).reshape(2, 3, 4)


class Wire:
    """Data that arrives when it is waited for: until then the memory holds NaN."""

    def __init__(self, values: torch.Tensor = VALUES):
        self.waits = 0
        self.buffer = torch.full_like(values, float("nan")) if values.is_floating_point() else torch.zeros_like(values)
        self._values = values
        self.source = PendingSource(self._arrive)
        self.tensor = self.source.wrap(self.buffer)

    def _arrive(self) -> None:
        self.waits += 1
        self.buffer.copy_(self._values)


METADATA: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda t: t.shape,
    "dtype": lambda t: t.dtype,
    "device": lambda t: t.device,
    "layout": lambda t: t.layout,
    "ndim": lambda t: t.ndim,
    "is_cuda": lambda t: t.is_cuda,
    "is_cpu": lambda t: t.is_cpu,
    "is_meta": lambda t: t.is_meta,
    "is_sparse": lambda t: t.is_sparse,
    "is_quantized": lambda t: t.is_quantized,
    "is_nested": lambda t: t.is_nested,
    "is_leaf": lambda t: t.is_leaf,
    "requires_grad": lambda t: t.requires_grad,
    "grad_fn": lambda t: t.grad_fn,
    "itemsize": lambda t: t.itemsize,
    "nbytes": lambda t: t.nbytes,
    "size()": lambda t: t.size(),
    "size(1)": lambda t: t.size(1),
    "dim()": lambda t: t.dim(),
    "numel()": lambda t: t.numel(),
    "stride()": lambda t: t.stride(),
    "storage_offset()": lambda t: t.storage_offset(),
    "element_size()": lambda t: t.element_size(),
    "is_contiguous()": lambda t: t.is_contiguous(),
    "is_floating_point()": lambda t: t.is_floating_point(),
    "torch.is_floating_point": torch.is_floating_point,
    "torch.is_complex": torch.is_complex,
    "torch.numel": torch.numel,
    "is_inference()": lambda t: t.is_inference(),
    "get_device()": lambda t: t.get_device(),
    "len": len,
    "isinstance": lambda t: isinstance(t, torch.Tensor),
    "torch.is_tensor": torch.is_tensor,
}

VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda t: t.view(6, 4),
    "view(dtype)": lambda t: t.view(torch.int32),
    "reshape": lambda t: t.reshape(-1),
    "torch.reshape": lambda t: torch.reshape(t, (4, 6)),
    "flatten": lambda t: t.flatten(1),
    "unflatten": lambda t: t.unflatten(2, (2, 2)),
    "chunk": lambda t: t.chunk(2),
    "torch.chunk": lambda t: torch.chunk(t, 2, dim=-1),
    "split": lambda t: t.split([1, 2], 1),
    "torch.split": lambda t: torch.split(t, 1),
    "unbind": lambda t: t.unbind(1),
    "torch.unbind": lambda t: torch.unbind(t),
    "iteration": list,
    "unpacking": lambda t: (lambda a, b: (a, b))(*t),
    "narrow": lambda t: t.narrow(1, 1, 2),
    "select": lambda t: t.select(0, 1),
    "squeeze": lambda t: t.unsqueeze(0).squeeze(0),
    "unsqueeze": lambda t: t.unsqueeze(-1),
    "permute": lambda t: t.permute(2, 0, 1),
    "transpose": lambda t: t.transpose(0, 1),
    "expand": lambda t: t.unsqueeze(0).expand(2, 2, 3, 4),
    "detach": lambda t: t.detach(),
    "t[1]": lambda t: t[1],
    "t[-1]": lambda t: t[-1],
    "t[:, 1:]": lambda t: t[:, 1:],
    "t[..., None, 0]": lambda t: t[..., None, 0],
    "views of views": lambda t: t[:, 1:].chunk(2)[1].unsqueeze(0).transpose(1, 3)[0],
}

REAL: dict[str, Callable[[torch.Tensor], Any]] = {
    "add": lambda t: t + 1,
    "radd": lambda t: 1 + t,
    "as second operand": lambda t: torch.ones(4) * t,
    "torch function": lambda t: torch.stack([t, t]),
    "nn.functional": torch.nn.functional.silu,
    "keyword": lambda t: torch.add(torch.zeros(4), other=t),
    "to(dtype)": lambda t: t.to(torch.float64),
    "contiguous": lambda t: t.contiguous(),
    "clone": lambda t: t.clone(),
    "deepcopy": copy.deepcopy,
    "mean": lambda t: t.mean(),
    "item": lambda t: t[0, 0, 1].item(),
    "float": lambda t: float(t[0, 0, 1]),
    "bool": lambda t: bool(t[0, 0, 1]),
    "compare": lambda t: t > 3,
    "equal": lambda t: torch.equal(t, t),
    "tolist": lambda t: t.tolist(),
    "repr": repr,
    "format": lambda t: f"{t[0, 0, 1]:.2f}",
    "numpy": lambda t: t.numpy(),
    "numpy.asarray": np.asarray,
    "data_ptr": lambda t: t.data_ptr() and None,
    "storage": lambda t: t.untyped_storage().tolist(),
    "index by tensor": lambda t: t[torch.tensor([1])],
    "index by mask": lambda t: t[torch.ones(2, dtype=torch.bool)],
    "index by list": lambda t: t[[1, 0]],
    "index by range of lists": lambda t: t[:, [0, 2]],
    "as index": lambda t: torch.arange(30)[t.long()],
    "setitem of another": lambda t: torch.zeros(2, 3, 4).__setitem__(slice(None), t),
    "flatten that copies": lambda t: t.transpose(0, 1).flatten(),
    "reshape that copies": lambda t: t.transpose(0, 2).reshape(-1),
    "in a list": lambda t: torch.cat([torch.zeros(1, 3, 4), t]),
    "dlpack": torch.from_dlpack,
    "torch.ops": lambda t: torch.ops.aten.mul.Tensor(t, t),
}


def plain(value: Any) -> Any:
    """Without pending tensors, for comparison."""
    materialize(value)
    return value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
    return bool(np.array_equal(a, b))


@pytest.mark.parametrize("name", METADATA)
def test_metadata_does_not_wait(name: str) -> None:
    wire = Wire()
    assert METADATA[name](wire.tensor) == METADATA[name](VALUES)
    assert wire.waits == 0
    assert type(wire.tensor) is PendingTensor


@pytest.mark.parametrize("name", VIEWS)
def test_views_do_not_wait(name: str) -> None:
    wire = Wire()
    got = VIEWS[name](wire.tensor)
    assert wire.waits == 0
    leaves = list(got) if isinstance(got, (list, tuple)) else [got]
    assert all(type(leaf) is PendingTensor for leaf in leaves)
    expected = VIEWS[name](VALUES)
    assert same(plain(got), expected)
    assert wire.waits == 1
    assert all(type(leaf) is torch.Tensor for leaf in [*leaves, wire.tensor])


@pytest.mark.parametrize("name", REAL)
def test_real_operations_wait_once(name: str) -> None:
    wire = Wire()
    got = REAL[name](wire.tensor)
    assert wire.waits == 1
    assert type(wire.tensor) is torch.Tensor
    assert same(got, REAL[name](VALUES))
    assert not isinstance(got, PendingTensor)


def test_in_place_operations_wait_and_write_to_the_same_memory() -> None:
    for act in (
        lambda t: t.mul_(2),
        lambda t: t.__imul__(2),
        lambda t: t.__setitem__(..., 2 * t),
        lambda t: torch.mul(t, 2, out=t),
        lambda t: t.view(-1).mul_(2),
    ):
        wire = Wire()
        act(wire.tensor)
        assert wire.waits == 1
        assert torch.equal(wire.buffer, 2 * VALUES)
        assert torch.equal(wire.tensor, 2 * VALUES)


def test_earlier_views_see_later_writes() -> None:
    wire = Wire()
    row = wire.tensor[1]
    wire.tensor.zero_()
    assert type(row) is torch.Tensor
    assert row.sum() == 0


def test_after_the_wait_everything_is_plain() -> None:
    wire = Wire()
    views = [wire.tensor[0], wire.tensor.view(-1), wire.tensor.chunk(2)[1]]
    wire.source.wait()
    wire.source.wait()
    assert wire.waits == 1
    assert wire.source.ready
    assert {type(t) for t in [wire.tensor, *views]} == {torch.Tensor}
    assert not hasattr(wire.tensor, "_source")
    assert type(wire.source.wrap(torch.zeros(1))) is torch.Tensor


def test_deleted_views_are_ignored() -> None:
    wire = Wire()
    for _ in range(10):
        wire.tensor.view(-1)
    gc.collect()
    assert torch.equal(wire.tensor + 0, VALUES)


def test_save_and_pickle() -> None:
    for dump, load in (
        (lambda t, f: torch.save(t, f), lambda f: torch.load(f)),
        (lambda t, f: pickle.dump({"x": [t]}, f), lambda f: pickle.load(f)["x"][0]),
    ):
        wire = Wire()
        file = io.BytesIO()
        dump(wire.tensor, file)
        assert wire.waits == 1
        file.seek(0)
        got = load(file)
        assert type(got) is torch.Tensor
        assert torch.equal(got, VALUES)


def test_materialize_looks_into_containers() -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    Pair = namedtuple("Pair", "a b")
    for wrap in (
        lambda t: [t],
        lambda t: (1, [t, None]),
        lambda t: {"x": {"y": t}},
        lambda t: OrderedDict(x=t),
        lambda t: Pair("a", t),
        lambda t: Transformer2DModelOutput(sample=t),
    ):
        wire = Wire()
        materialize(wrap(wire.tensor))
        assert wire.waits == 1
        assert type(wire.tensor) is torch.Tensor


def test_two_sources_in_one_operation() -> None:
    one, two = Wire(), Wire()
    assert torch.equal(one.tensor + 2 * two.tensor, 3 * VALUES)
    assert (one.waits, two.waits) == (1, 1)


def test_indexing_one_by_the_other_waits_for_both() -> None:
    one, two = Wire(), Wire(torch.tensor([1, 0]))
    assert torch.equal(one.tensor[two.tensor], VALUES[[1, 0]])
    assert (one.waits, two.waits) == (1, 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_modes(mode) -> None:
    with mode():
        wire = Wire()
        first, second = wire.tensor.chunk(2)
        assert wire.waits == 0
        assert torch.equal(first + second, VALUES[:1] + VALUES[1:])


def test_a_failure_is_raised_and_leaves_nothing_half_filled() -> None:
    errors: list[Exception] = [ValueError("lost"), TimeoutError("late")]
    buffer = torch.zeros(4)

    def arrive() -> None:
        if errors:
            raise errors.pop(0)
        buffer.fill_(3)

    source = PendingSource(arrive)
    tensor = source.wrap(buffer)
    view = tensor[1:]
    with pytest.raises(ValueError, match="lost"):
        tensor + 1
    with pytest.raises(TimeoutError, match="late"):
        materialize([view, tensor])
    assert not source.ready
    assert type(tensor) is type(view) is PendingTensor
    assert tensor.shape == (4,)
    assert (view + 1).tolist() == [4, 4, 4]
    assert type(tensor) is type(view) is torch.Tensor


def test_a_failure_of_the_second_keeps_the_first() -> None:
    def fail() -> None:
        raise ValueError("lost")

    good, bad = Wire(), PendingSource(fail)
    lost = bad.wrap(torch.zeros(4))
    with pytest.raises(ValueError, match="lost"):
        torch.add(good.tensor, lost)
    assert type(good.tensor) is torch.Tensor
    assert torch.equal(good.tensor, VALUES)
    assert type(lost) is PendingTensor
