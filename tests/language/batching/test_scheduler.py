"""The scheduler without a model: every sequence advances and ends once, within all limits, whatever the limits are."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from shardit import SamplingParams
from shardit.language.batching.memory import fitting
from shardit.language.batching.scheduler import FREE_COLUMNS, BatchLimits, Group, Round, Scheduler
from shardit.language.batching.sequence import Sequence
from shardit.language.request.rows import PromptRow


def sequence(number: int, prompt: int, new: int) -> Sequence:
    params = SamplingParams(temperature=0, max_tokens=new)
    return Sequence(number, 0, PromptRow(tuple(range(prompt)), params, 0), number)


@dataclass
class Player:
    """Plays the rounds of all groups in turn, as ranks do, and checks each of them.

    cached: for each sequence in a batch or a prefill, the tokens whose keys it has. most: the most bytes used.
    """

    scheduler: Scheduler
    cached: dict[Sequence, int] = field(default_factory=dict)
    ended: list[Sequence] = field(default_factory=list)
    rounds: int = 0
    most: int = 0
    groups: list[Group] = field(default_factory=list)

    def play(self, cancel_at: dict[int, int] | None = None) -> None:
        idle = 0
        while self.scheduler.waiting or self.groups:
            before = sum(one.length for one in self.cached) + len(self.ended)
            for key in [key for key, at in (cancel_at or {}).items() if at == self.rounds]:
                self.scheduler.cancel(key)
            if (group := self.scheduler.place()) is not None:
                self.groups.append(group)
            for group in list(self.groups):
                self.step(group)
            self.rounds += 1
            moved = before != sum(one.length for one in self.cached) + len(self.ended)
            idle = 0 if moved or any(group.prefill for group in self.groups) else idle + 1
            assert idle < 4, "nothing advances"
            assert self.rounds < 10_000

    def step(self, group: Group) -> None:
        before = list(group.rows)
        todo = self.scheduler.next(group)
        for one in before:
            if one not in group.rows:
                del self.cached[one]
        if todo is None:
            self.groups.remove(group)
            return
        assert todo.keep is None or [before[number] for number in todo.keep] == group.rows
        self.check(group, todo)
        if todo.decode:
            for one in group.rows:
                assert self.cached[one] == one.length - 1
                self.cached[one] += 1
            self.token(group.rows)
        if todo.chunk is not None:
            prefill = todo.chunk.prefill
            assert todo.chunk.start < todo.chunk.stop <= prefill.width
            assert all(one not in self.cached for one in prefill.sequences)
            if todo.chunk.is_last:
                self.scheduler.joined(prefill, group)
                self.cached |= {one: one.length for one in prefill.sequences}
                self.token(prefill.sequences)

    def check(self, group: Group, todo: Round) -> None:
        limits = self.scheduler.limits
        assert len(group.members) <= limits.rows
        assert todo.columns == max((one.length - 1 for one in group.rows), default=0) or not limits.joins
        if todo.chunk is not None and limits.chunks:
            rows = len(todo.chunk.prefill.sequences)
            assert rows * (todo.chunk.stop - todo.chunk.start) <= max(limits.tokens, rows)
        if not limits.joins:
            assert len({one.length for one in group.members}) == 1
        used = sum(len(one.rows) * self.scheduler.row_bytes(one.columns) for one in self.scheduler.groups)
        self.most = max(self.most, used)

    def token(self, sequences: list[Sequence]) -> None:
        for one in sequences:
            if one.ended is None or not self.scheduler.limits.joins:
                one.made.append(0)
            if one.ended is None and len(one.made) >= (one.row.params.max_tokens or 0):
                one.ended = "length", None
                self.ended.append(one)


WORK = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    WORK,
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(0, 300)),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_every_sequence_ends_once(
    work: list[tuple[int, int]],
    rows: int,
    tokens: int,
    groups: int,
    spare: int | None,
    able: tuple[bool, bool, bool],
) -> None:
    joins, pads, chunks = able
    longest = max(prompt + new for prompt, new in work) + 1
    memory = None if spare is None or not joins else longest + spare
    limits = BatchLimits(rows, tokens, groups, memory, joins, pads and joins, chunks and joins)
    player = Player(Scheduler(limits, lambda columns: columns))
    sequences = [sequence(number, *one) for number, one in enumerate(work)]
    for one in sequences:
        player.scheduler.add(one)
    player.play()
    assert sorted(one.arrival for one in player.ended) == list(range(len(work)))
    assert all(len(one.made) == new for one, (_, new) in zip(sequences, work, strict=True)) or not joins
    assert not player.cached or not joins
    assert memory is None or player.most <= memory


@settings(max_examples=100, deadline=None)
@given(WORK, st.dictionaries(st.integers(0, 11), st.integers(0, 30), max_size=6))
def test_cancelled_sequences_leave(work: list[tuple[int, int]], cancel_at: dict[int, int]) -> None:
    player = Player(Scheduler(BatchLimits(3, 16, 2, memory=150), lambda columns: columns))
    for number, one in enumerate(work):
        player.scheduler.add(sequence(number, *one))
    player.play(cancel_at)
    kept = {one.arrival for one in player.ended}
    assert kept >= set(range(len(work))) - cancel_at.keys()
    assert not player.cached
    assert player.scheduler.used == 0


def test_few_sequences_are_spread_over_groups() -> None:
    player = Player(Scheduler(BatchLimits(32, 512, 3), lambda columns: columns))
    for number in range(3):
        player.scheduler.add(sequence(number, 5, 5))
    for _ in range(3):
        group = player.scheduler.place()
        assert group is not None
        assert len(group.members) == 1
    assert player.scheduler.place() is None


def test_the_youngest_gives_way() -> None:
    player = Player(Scheduler(BatchLimits(8, 512, memory=60), lambda columns: columns))
    sequences = [sequence(number, 8, 40) for number in range(4)]
    for one in sequences:
        player.scheduler.add(one)
    player.play()
    assert sum(one.preemptions for one in sequences) > 0
    assert sequences[0].preemptions == 0  # the oldest never does
    assert player.ended[0] is sequences[0]


def test_padding_is_limited() -> None:
    """A short prompt beside a long text gets a batch of its own."""
    scheduler = Scheduler(BatchLimits(8, 4096), lambda columns: columns)
    scheduler.add(sequence(0, 10 * FREE_COLUMNS, 5))
    long = scheduler.place()
    scheduler.add(sequence(1, 5, 5))
    short = scheduler.place()
    assert long is not None
    assert short is not None
    assert [len(long.members), len(short.members)] == [1, 1]
    scheduler.add(sequence(2, 6, 5))
    assert scheduler.place() is None
    assert [len(long.members), len(short.members)] == [1, 2]


def test_a_long_prompt_delays_no_step_by_more_than_a_chunk() -> None:
    player = Player(Scheduler(BatchLimits(16, 64), lambda columns: columns))
    for number in range(8):
        player.scheduler.add(sequence(number, 8, 40))
    group = player.scheduler.place()
    assert group is not None
    player.groups.append(group)
    player.scheduler.place()
    for _ in range(3):
        player.step(group)
    running = [one for one in group.rows if one.ended is None]
    assert len(running) == 8
    late = sequence(8, 512, 4)
    player.scheduler.add(late)
    for _ in range(512 // 64):
        lengths = [one.length for one in running]
        if (placed := player.scheduler.place()) is not None:
            player.groups.append(placed)
        for one in player.groups:
            player.step(one)
        assert [one.length for one in running] == [length + 1 for length in lengths]
    assert len(late.made) == 1


def test_the_longest_request_that_fits() -> None:
    assert fitting(100, 1000, lambda columns: 4 * columns) == 100
    assert fitting(1000, 1000, lambda columns: 4 * columns) == 249
    assert fitting(None, 1000, lambda columns: 0) is None
    assert fitting(100, None, lambda columns: columns) == 100
