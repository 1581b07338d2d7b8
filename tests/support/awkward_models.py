"""Small models that pass data around their blocks in every way that might go wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

WIDTH = 16


class Block(nn.Module):
    """y = x + tanh(W x + e) with a time vector e."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH) * 0.9)
        self.cache: Any = None

    def step(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x) + e) * self.scale

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
        return self.step(x, e)


class Plain(nn.Module):
    """Six blocks in a row; the base of all others, which change `run` or the class of the blocks.

    refused: part of the reason with which the model must be refused, on all ranks; None where it must be right.
    """

    block: type[nn.Module] = Block
    refused: str | None = None
    error: type[Exception] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList([self.block() for _ in range(6)])
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.last(self.run(self.first(x), self.time(t[:, None])[:, None]))

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, e)
        return x


class ViewsOfOneStorage(Plain):
    class block(Block):
        def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
            return torch.cat([self.step(x, e), x * 0.5], -1).chunk(2, -1)

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, half = block(x, e)
            x = x + half
        return x + half


class NoneAndLists(Plain):
    class block(Block):
        def forward(self, pair: list[Any], e: torch.Tensor) -> Any:
            return [self.step(pair[0], e), None, {"skip": pair[2]["skip"] + pair[0]}]

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        state: Any = [x, None, {"skip": x}]
        for block in self.blocks:
            state = block(state, e)
        assert state[1] is None
        return state[0] + state[2]["skip"]


class UnchangedInput(Plain):
    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            block.idle = i % 2 == 0
            x = block(x, e)
        return x

    class block(Block):
        idle = False

        def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
            return x if self.idle else self.step(x, e)


class ViewOfInput(Plain):
    class block(Block):
        def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
            return self.step(x, e), x[:, 1:], x.transpose(0, 1)

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        total = x
        for block in self.blocks:
            x, tail, turned = block(x, e)
            x = torch.cat([x[:, :1], x[:, 1:] + tail], 1) + turned.transpose(0, 1)
        return x + total


class InPlaceInBlock(Plain):
    class block(Block):
        def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
            e.mul_(0.9)
            x.copy_(self.step(x, e))
            return x


class InPlaceViewInBlock(Plain):
    class block(Block):
        def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
            x[:, ::2] += e
            return self.step(x, e)

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            before = x
            x = block(x, e) + before
        return x


class InPlaceOutside(Plain):
    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.blocks:
            x = block(x, e)
            kept.append(x)
            x += e
        for k in kept:
            x = x + k
        return x


class Skips(Plain):
    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.blocks[:3]:
            x = block(x, e)
            skips.append(x)
        for block in self.blocks[3:]:
            x = block(x + skips.pop(), e)
        return x


class EarlyTensor(Plain):
    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        early, first = x * 3, None
        for block in self.blocks:
            x = block(x, e)
            first = x if first is None else first
        return x + early + first


class ReadsParameterOutside(Plain):
    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        x = super().run(x, e)
        return x + self.blocks[1].linear(x) * self.blocks[4].scale


class CalledTwice(Plain):
    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return super().run(super().run(x, e) + x, e)


class SkipsSomeBlocks(Plain):
    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks[4:], *self.blocks[:2]]:
            x = block(x, e)
        return x


class Strided(Plain):
    class block(Block):
        def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
            y = self.step(x, e)
            return y.transpose(0, 1).contiguous().transpose(0, 1), y.sum(), y[:0], e.expand(3, *e.shape)

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, one, none, wide = block(x, e)
            x = x + one * 0.01 + none.sum() + wide.mean()
        return x + one


class Indices(Plain):
    class block(Block):
        def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
            y = self.step(x, e)
            return y, y.argmax(1)

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        first = None
        for block in self.blocks:
            x, order = block(x, e)
            first = order if first is None else first  # carried, and used as an index before it arrives
            x = x + x.gather(1, order[:, None].expand_as(x)) * 0.1
            x = x - x.gather(1, first[:, None].expand_as(x)) * 0.1
        return x


class TiedBlocks(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[5].linear = self.blocks[0].linear
        self.last = self.blocks[2].linear


class ReadsValue(Plain):
    refused = "reads a value on the host"

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, e)
            x = x * min(1.0, x.abs().max().item())
        return x


class ChoosesByValue(Plain):
    refused = "reads a value on the host"

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if x.mean() > 0:
                x = -x
            x = block(x, e)
        return x


class MaskOutside(Plain):
    refused = "makes a shape from values"

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        x = super().run(x, e)
        return x + x[x > 0].sum()


class ReturnsNumber(Plain):
    refused = "returns a number"

    class block(Block):
        def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
            return self.step(x, e), float(x.abs().max())

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, most = block(x, e)
            x = x / max(most, 1)
        return x


class ReturnsObject(Plain):
    refused = "inside an object"

    class block(Block):
        def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
            return SimpleNamespace(x=self.step(x, e))

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, e).x
        return x


class WritesArgument(Plain):
    refused = "writes into one of its arguments"

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return super().forward(x, t)


class MiddleTensor(Plain):
    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, e)
            if i == 0:
                middle = x.sin()
        return x + middle


class SumsForLaterBlocks(Plain):
    """As a UNet with ControlNet: sums with block outputs, made between blocks, that later blocks get."""

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.blocks[:3]:
            x = block(x, e)
            skips.append(x)
        skips = [skip + e for skip in skips]
        for block in self.blocks[3:]:
            x = block(x, skips.pop())
        return x


class SumsInPlaceForLaterBlocks(Plain):
    """As a UNet with T2I-Adapter and ControlNet: the summands were written to before, and are again later."""

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.blocks[:3]:
            x = block(x, e)
            skips.append(x)
            x += e
        sums = [skip * 2 for skip in skips]
        for skip in skips:
            skip.mul_(0.5)
        for block in self.blocks[3:]:
            x = block(x, sums.pop())
            x += skips.pop()
            for skip in skips:
                skip.add_(x)
        return x


class SumsOfSums(Plain):
    """Tensors between blocks are made from earlier tensors between blocks, in every gap, and used at the end."""

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        total, steps = x * 0.5, []
        for block in self.blocks:
            x = block(x, e)
            total = total + x.sin()
            steps.append(total.mean(-1, keepdim=True))
        return x + total * torch.cat(steps, -1).sum(-1, keepdim=True)


class WritesBuffer(Plain):
    """A buffer that is made before the blocks, filled between them, and given to none."""

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        buffer = torch.zeros(len(self.blocks), *x.shape)
        for i, block in enumerate(self.blocks):
            x = block(x, e)
            buffer[i] = x
            x = x + buffer[: i + 1].mean(0)
        return x + buffer.sum(0)


class SumsAcrossCalls(Plain):
    """Blocks run twice, in another order; sums of the first pass are used in the second."""

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in [*self.blocks[3:], *self.blocks[:3]]:
            x = block(x, e)
            kept.append(x.cos() + e)
            x *= 0.9
        for block in self.blocks:
            x = block(x, kept.pop())
            x -= 0.1 * sum(k.mean() for k in kept)
        return x


class PopsFromArgument(Plain):
    """As HunyuanDiT with ControlNet: the forward empties a list that it is given."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, more: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        x, e = self.first(x), self.time(t[:, None])[:, None]
        for block in self.blocks:
            x = block(x, e) + more.pop()
        return self.last(x)


class FillsArgument(Plain):
    refused = "into a list or dict among its arguments"

    def forward(self, x: torch.Tensor, t: torch.Tensor, more: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        out = super().forward(x, t)
        more.append(out)
        return out


class Caching(Block):
    def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
        self.cache = self.step(x, e)
        return self.cache * 1.0


class AttributeOutside(Plain):
    refused = "the same control flow on every rank"
    block = Caching

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            block.cache = None
        x = super().run(x, e)
        return x + self.blocks[1].cache


class AttributeOrNothing(Plain):
    refused = ""
    block = Caching

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            block.cache = None
        x = super().run(x, e)
        return x if self.blocks[1].cache is None else x + self.blocks[1].cache


class Remembering(Block):
    def forward(self, x: torch.Tensor, e: torch.Tensor, notes: dict[str, int]) -> Any:  # type: ignore[override]
        notes["calls"] = notes.get("calls", 0) + 1
        return self.step(x, e) * notes["calls"]


class SharedDict(Plain):
    refused = "changes a list or dict"
    block = Remembering

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        notes: dict[str, int] = {}
        for block in self.blocks:
            x = block(x, e, notes)
        return x


class NumpyOutside(Plain):
    refused = "with placeholders"

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, e)
            if i == 0:
                kept = float(x.detach().numpy().sum())
        return x * kept


class NumpyThatFails(Plain):
    refused = "it fails (ValueError"

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, e)
            x = x * (1 + int(x.detach().numpy().sum()) % 3)
        return x


class FailsInBlock(Plain):
    error = KeyError

    class block(Block):
        def forward(self, x: torch.Tensor, e: torch.Tensor) -> Any:
            if x.shape[1] == 5 and hasattr(self, "staged"):
                raise KeyError("in a block")
            return self.step(x, e)

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "shardit_stages"):
            self.blocks[3].staged = True
        return super().run(x, e)


class FailsOutside(FailsInBlock):
    error = IndexError
    block = Block

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        x = super().run(x, e)
        if hasattr(self, "shardit_stages"):
            raise IndexError("outside the blocks")
        return x


MODELS: dict[str, type[Plain]] = {
    cls.__name__: cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, Plain)
}
