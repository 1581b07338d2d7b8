"""The scheduler: which sequences a batch computes in each round. It knows neither tensors nor processes.

Sequences wait in a queue by arrival. They are distributed over groups; a group is one batch with one cache, and several
groups are in flight at once, at least one per stage. In each round a group decodes one token of each of its rows, then
prefills one chunk of those that are about to join. Keys are aligned on the right, so a group has as many columns as its
longest row, and shorter rows are padded on the left.

Every rank runs the same scheduler with the same calls in the same order.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from shardit.language.batching.sequence import CANCELLED, Sequence

FREE_COLUMNS = 256
"""Padding of groups with at most this many columns is not limited."""


@dataclass(frozen=True)
class BatchLimits:
    """rows: maximum sequences of a group. tokens: maximum rows times columns of one prefill. groups: number of groups
    over which sequences are distributed. memory: maximum bytes of all caches on a rank; None for no limit. joins:
    whether sequences may join and leave a running group; if not, a group has rows of one length that start together.
    pads, chunks: whether prompts of different lengths may be prefilled together, and one in several chunks."""

    rows: int
    tokens: int
    groups: int = 1
    memory: int | None = None
    joins: bool = True
    pads: bool = True
    chunks: bool = True


@dataclass(eq=False)
class Prefill:
    """Sequences that are computed up to their present length, in chunks of columns, before they join. width: columns.
    done: columns computed so far. known: of these, columns whose keys were kept from another text."""

    sequences: list[Sequence]
    width: int
    done: int = 0
    known: int = 0


@dataclass(frozen=True)
class Chunk:
    """Columns `start` to `stop` of a prefill."""

    prefill: Prefill
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the prefill is complete after it."""
        return self.stop == self.prefill.width


@dataclass(frozen=True)
class Round:
    """Next step of a group. keep: indices of the rows that stay, None for all. columns: of the cache with these
    rows. decode: whether its rows get one more token each. chunk: of the sequences that are about to join."""

    keep: tuple[int, ...] | None
    columns: int
    decode: bool
    chunk: Chunk | None


@dataclass(eq=False)
class Group:
    """A batch. rows: in the order of its cache. columns: of its cache. joining: sequences assigned to it and not
    started. started: whether it has had rows or a prefill."""

    rows: list[Sequence] = field(default_factory=list)
    columns: int = 0
    joining: list[Sequence] = field(default_factory=list)
    prefill: Prefill | None = None
    started: bool = False

    @property
    def members(self) -> list[Sequence]:
        """All sequences that are or will be in the batch."""
        return [*self.rows, *(self.prefill.sequences if self.prefill else ()), *self.joining]

    @property
    def width(self) -> int:
        """Columns when all members have joined."""
        return max([self.columns, *(one.length for one in self.members)])


class Scheduler:
    """row_bytes: returns the bytes of the cache of a row with a number of columns, on the rank with the largest.
    known: returns how many tokens of a sequence need not be computed, because their keys are kept elsewhere.
    """

    def __init__(
        self,
        limits: BatchLimits,
        row_bytes: Callable[[int], int],
        known: Callable[[Sequence], int] = lambda sequence: 0,
    ):
        self.limits, self.row_bytes, self.known = limits, row_bytes, known
        self.waiting: list[Sequence] = []
        self.groups: list[Group] = []
        self._starved = False

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue."""
        insort(self.waiting, sequence, key=lambda one: one.arrival)

    def cancel(self, key: int) -> None:
        """Remove the sequences of a request: at once from the queue, from batches before their next step."""
        self.waiting = [one for one in self.waiting if one.key != key]
        for group in self.groups:
            for one in group.members:
                if one.key == key and one.ended is None:
                    one.ended = CANCELLED

    @property
    def used(self) -> int:
        """Bytes of all caches, with the next token of each row."""
        return sum(self._bytes(group) for group in self.groups)

    def place(self) -> Group | None:
        """Assign waiting sequences to groups, in order, while there is room. Return a group that starts with this, of
        which the caller runs the rounds; to be called again then."""
        while self.waiting and not self._starved:
            group = self._room(self.waiting[0])
            if group is None:
                return None
            group.joining.append(self.waiting.pop(0))
            if group not in self.groups:
                self.groups.append(group)
                return group
        return None

    def next(self, group: Group) -> Round | None:
        """Return the next round of a group; None when it has no members and has ended."""
        keep = self._drop_ended(group)
        stays = self._make_room(group)
        if stays is not None:
            keep = stays if keep is None else tuple(keep[number] for number in stays)
        if not group.members:
            self.groups.remove(group)
            return None
        chunk = self._chunk(group)
        decode = bool(group.rows) and not self._is_over(group)
        columns = group.columns
        group.columns += decode
        return Round(keep, columns, decode, chunk)

    def joined(self, prefill: Prefill, group: Group) -> None:
        """Record that a complete prefill has been merged into the batch of its group."""
        group.prefill = None
        group.rows += prefill.sequences
        group.columns = max(group.columns, prefill.width)

    def _bytes(self, group: Group) -> int:
        members = len(group.members)
        return members * self.row_bytes(group.width + 1) if members else 0

    def _fits(self, group: Group, sequence: Sequence) -> bool:
        if self.limits.memory is None or not self.groups:
            return True
        width = max(group.width if group.members else 0, sequence.length) + 1
        own = (len(group.members) + 1) * self.row_bytes(width)
        return own + sum(self._bytes(one) for one in self.groups if one is not group) <= self.limits.memory

    def _room(self, sequence: Sequence) -> Group | None:
        """Return the group with the fewest members that can take a sequence, or a new one; None if there is none."""
        limits, active = self.limits, [group for group in self.groups if group.members]
        found = [group for group in active if self._takes(group, sequence)]
        rows = sum(len(group.members) for group in active)
        if len(active) < limits.groups or (not found and rows < limits.rows * limits.groups and limits.joins):
            found.append(Group())
        found = [group for group in found if self._fits(group, sequence)]
        return min(found, key=lambda group: len(group.members), default=None)

    def _takes(self, group: Group, sequence: Sequence) -> bool:
        count, length = len(group.members), sequence.length
        if count >= self.limits.rows:
            return False
        if not self.limits.joins:
            return not group.started and group.width == length
        width = max(group.width, length)
        padded, real = (count + 1) * width, sum(one.length for one in group.members) + length
        return width <= FREE_COLUMNS or 2 * padded <= 3 * real  # padding is at most a third

    def _drop_ended(self, group: Group) -> tuple[int, ...] | None:
        group.joining = [one for one in group.joining if one.ended is None]
        if group.prefill is not None and all(one.ended is not None for one in group.prefill.sequences):
            group.prefill = None
        if not any(one.ended is not None for one in group.rows):
            return None
        if not self.limits.joins and any(one.ended is None for one in group.rows):
            return None  # rows cannot leave alone
        stays = tuple(number for number, one in enumerate(group.rows) if one.ended is None)
        group.rows = [group.rows[number] for number in stays]
        group.columns = _columns(group.rows)
        return stays

    def _is_over(self, group: Group) -> bool:
        if self.limits.memory is None or self._holds_oldest_alone(group):
            return False
        return self.used > self.limits.memory

    def _holds_oldest_alone(self, group: Group) -> bool:
        """Whether a group is the only one: its oldest sequence must go on in any case."""
        return len(group.members) == 1 and all(one is group or not one.members for one in self.groups)

    def _make_room(self, group: Group) -> tuple[int, ...] | None:
        """Preempt the youngest sequences of a group while the caches are over the limit. The oldest sequence of all
        stays: if its group has none to give up, the others give up theirs in their next rounds."""
        memory = self.limits.memory
        if memory is None or not self.limits.joins:
            return None
        oldest = min((one.arrival for other in self.groups for one in other.members), default=-1)
        before, holds = list(group.rows), any(one.arrival == oldest for one in group.members)
        while self.used > memory or (self._starved and not holds):
            able = [one for one in (*group.rows, *group.joining) if one.arrival != oldest]
            if not able:
                break
            self._preempt(group, max(able, key=lambda one: one.arrival))
        self._starved = self.used > memory
        return None if len(group.rows) == len(before) else tuple(before.index(one) for one in group.rows)

    def _preempt(self, group: Group, sequence: Sequence) -> None:
        if sequence in group.joining:
            group.joining.remove(sequence)
        else:
            group.rows.remove(sequence)
            group.columns = _columns(group.rows)
            sequence.preemptions += 1
        self.add(sequence)

    def _chunk(self, group: Group) -> Chunk | None:
        if group.prefill is None and group.joining and (self.limits.joins or not group.started):
            group.prefill = self._prefill(group.joining)
            group.started = True
        prefill = group.prefill
        if prefill is None:
            return None
        columns = max(1, self.limits.tokens // len(prefill.sequences)) if self.limits.chunks else prefill.width
        start, prefill.done = prefill.done, min(prefill.width, prefill.done + columns)
        return Chunk(prefill, start, prefill.done)

    def _prefill(self, joining: list[Sequence]) -> Prefill:
        """Take from the queue of a group what fits into one chunk, at least one sequence."""
        taken = [joining.pop(0)]
        width = taken[0].length
        if (known := self.known(taken[0])) > 0:
            return Prefill(taken, width, known, known)
        while joining:
            following = joining[0].length
            wider = max(width, following)
            if not self.limits.pads and following != width:
                break
            if self.limits.joins and (len(taken) + 1) * wider > self.limits.tokens:
                break
            if self.known(joining[0]) > 0:
                break
            taken.append(joining.pop(0))
            width = wider
        return Prefill(taken, width)


def _columns(rows: list[Sequence]) -> int:
    """Return the columns of the cache of rows, all of which have a token that is not in the cache yet."""
    return max((one.length - 1 for one in rows), default=0)
