"""Messages between the user's process, the fork server and the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardit.config import TIMEOUT_S, DiffusionParallelConfig
from shardit.engine.process.channel import Packed
from shardit.errors import InputError, UnsupportedError
from shardit.language.options import LanguageOptions
from shardit.loading.dtypes import Setting, setting
from shardit.settings.checks import TEXT, is_number, matching, whole
from shardit.settings.declare import Flag, declare
from shardit.settings.model_options import ModelOptions

if TYPE_CHECKING:
    from shardit.diffusion.request.model_info import ModelInfo

TASK = "shardit.engine.tasks.pipelines"
"""The kind of model: a module that implements `Task`."""

SESSION = "shardit.engine.session:Session"
"""The session class of a rank, as "module:class"."""

MAX_TIMEOUT_S = 1_000_000
"""Eleven days; poll() counts milliseconds in 31 bits."""

TIMEOUT = matching(
    f"more than 0 and at most {MAX_TIMEOUT_S} seconds", lambda value: is_number(value) and 0 < value <= MAX_TIMEOUT_S
)
"""The check of a timeout."""


@dataclass(frozen=True)
class SessionSpec:
    """The settings with which a rank loads its share of the model."""

    model: str
    config: DiffusionParallelConfig
    dtype: Setting = declare(
        None,
        "Data type, as torch_dtype= in diffusers, or one for each component: transformer=bfloat16,vae=float32. "
        "[default: as diffusers loads]",
        flag=Flag(kind=str | None, metavar="<dtype>", read=lambda text: setting(text, "--dtype")),
    )
    """A name, a torch dtype, or a dict of these by component."""
    device: str | None = declare(None, "Device of the ranks, cuda or cpu. [default: cuda if there is one]", flag=None)
    max_in_flight: int = declare(1, "Requests that run at the same time.", whole(1), flag=None)
    timeout_s: float = declare(
        TIMEOUT_S, "Timeout for a message of another rank, in seconds.", TIMEOUT, flag=Flag("timeout")
    )
    task: str = TASK
    session: str = SESSION
    attention_backend: str | None = declare(
        None, "Attention back end, as set_attention_backend in diffusers. [default: native]", TEXT
    )
    language: LanguageOptions = field(default_factory=LanguageOptions)
    options: ModelOptions = field(default_factory=ModelOptions)
    can_cancel: bool = False
    """Whether requests may be cancelled while they run; those of a server may."""
    of_server: bool = False
    """The ranks belong to a server: they log as JSON, and outputs have arrays in place of tensors, as its supervisor
    imports no torch."""


# From the user's process to the fork server.


@dataclass(frozen=True)
class Check:
    """Import the packages that ranks need and find mistakes that can be found without ranks; answered by Checked or
    InputRejected."""

    spec: SessionSpec


@dataclass(frozen=True)
class Start:
    """Fork the ranks; the file descriptors of their channels follow, one per rank."""

    spec: SessionSpec
    world_size: int
    threads: int


@dataclass(frozen=True)
class Dump:
    """Dump the stack of every rank; answered by Stacks."""


@dataclass(frozen=True)
class Kill:
    """Stop the ranks, those that do not exit within `grace_s` seconds by SIGKILL; answered by RanksStopped."""

    grace_s: float = 0.0


# From the fork server to the user's process.


@dataclass(frozen=True)
class Checked:
    """`Check` found nothing wrong."""


@dataclass(frozen=True)
class RanksStarted:
    """The ranks run; `directory` is their private temporary folder."""

    pids: list[int]
    directory: str


@dataclass(frozen=True)
class Exited:
    """A rank exited: its exit code, or the negative number of the signal that killed it."""

    rank: int
    code: int


@dataclass(frozen=True)
class Stacks:
    """The stack of each rank as faulthandler writes it; empty for one that did not react."""

    by_rank: dict[int, str]


@dataclass(frozen=True)
class RanksStopped:
    """No rank is left."""


# From the user's process to every rank.


@dataclass(frozen=True)
class Begin:
    """Start a request next to those in flight; answered by `RequestFinished`. All ranks of a replica get the same
    `Begin` and `Cancel` messages in the same order, and act on them in the same round."""

    key: int
    request: Packed
    request_id: str = ""
    """For logs."""

    def load(self) -> Any:
        """Unpickle the request. Raises InputError if this process cannot unpickle it."""
        try:
            return self.request.load()
        except Exception as error:
            raise InputError(
                f"a request holds an object that the rank processes cannot load ({error}); pass plain values, "
                "or objects whose class or function is in an importable module"
            ) from error


@dataclass(frozen=True)
class Cancel:
    """End a request at its next turn, if it still runs."""

    key: int


# From a rank to the user's process.


@dataclass(frozen=True)
class Ready:
    """The rank has loaded its share."""

    info: ModelInfo


@dataclass(frozen=True)
class Progress:
    """A request has finished `step` of `total` steps (first rank of a replica only). made: the result of the step, for
    tasks with results step by step. logprobs: of each row, log probabilities for its token in `made`, if requested."""

    key: int
    step: int
    total: int
    made: Any = None
    logprobs: Any = None


@dataclass(frozen=True)
class BatchStep:
    """The progress of all requests of a batch in one step: one message in place of one for each request."""

    of: tuple[Progress, ...]


@dataclass(frozen=True)
class CacheUse:
    """The caches of a replica that runs batches, now and then (first rank of a replica of a server only). bytes: of all
    texts, also of ended ones that are kept. limit: None without one. hits, reused_tokens: since the last message,
    prompts that began with the keys of an ended text, and their tokens that were not computed again."""

    bytes: int
    limit: int | None
    hits: int
    reused_tokens: int


@dataclass(frozen=True)
class RequestFailed:
    """A request has failed on this rank; it must fail on all of them."""

    key: int
    reason: str


@dataclass(frozen=True)
class RequestFinished:
    """A request has ended on this rank: with `output` (first rank of a replica; None on the others), or by `error`.

    start: a checksum of the arguments of its first transformer call, which must be the same on all ranks of the
    replica. rejected: the rank could not load the request, by a mistake of the user. busy_s: seconds since the rank's
    start with requests in flight. waited_s: the part of these spent waiting for messages.
    """

    key: int
    start: str | None
    cancelled: bool = False
    error: str | None = None
    rejected: bool = False
    output: Any = None
    peak_bytes: int = 0
    busy_s: float = 0.0
    waited_s: float = 0.0


@dataclass(frozen=True)
class OutOfMemory:
    """The rank ran out of memory in a request; the rank exits."""

    key: int
    reason: str


@dataclass(frozen=True)
class InputRejected:
    """A mistake of the user, found by the fork server or a rank."""

    text: str
    unsupported: bool = False

    @classmethod
    def from_error(cls, error: InputError) -> InputRejected:
        """Build the message to send in place of the exception: the receiver may not know a subclass defined
        elsewhere."""
        return cls(str(error), isinstance(error, UnsupportedError))

    def error(self) -> InputError:
        """Return the exception, for the user's process."""
        return (UnsupportedError if self.unsupported else InputError)(self.text)


@dataclass(frozen=True)
class Failed:
    """An exception ended the rank (or the fork server's check); `of_peer`: it mentions the failure of another rank."""

    reason: str
    of_peer: bool = False
