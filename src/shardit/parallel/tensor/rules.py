"""Rules of tensor parallelism: names of submodules, as data. A new naming convention is a new entry here.

Rules that hold for some classes only belong to the `Family` of these classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Attention:
    """Names of the parts of an attention module.

    query, key_value: linears cut by columns at heads (a gate on the heads' output is like a query); out: linears cut by
    rows. query_norms, key_norms: norms over one head (kept) or over all (cut). per_head: tables with a column for each
    head. head_vectors: parameters with an entry for each head. head_gates: linears with an output for each head.
    second: queries and output of a second sequence; without the output, its heads are gathered. full_input: parts that
    read the input before the heads, and so are kept. gated: the first query linear may give each head a gate after its
    query. borrows: an attribute that is true if keys and values are those of another layer, which is cut alike. Any
    other part with parameters makes the module unknown: it is left whole unless a trial shows how to cut it.
    """

    query: tuple[str, ...]
    key_value: tuple[str, ...]
    out: tuple[str, ...]
    query_norms: tuple[str, ...] = ()
    key_norms: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()
    head_vectors: tuple[str, ...] = ()
    head_gates: tuple[str, ...] = ()
    second: tuple[tuple[str, str], ...] = ()
    gated: bool = False
    full_input: tuple[str, ...] = ()
    borrows: str = ""


ATTENTIONS = (
    Attention(
        query=("to_q", "add_q_proj", "to_q_t", "to_gate"),
        key_value=("to_k", "to_v", "add_k_proj", "add_v_proj", "to_k_t", "to_v_t"),
        out=("to_out.0", "to_out", "to_add_out", "to_out_t"),
        query_norms=("norm_q", "norm_added_q", "q_rms_norm", "q_rms_norm_t", "q_norm"),
        key_norms=("norm_k", "norm_added_k", "k_rms_norm", "k_rms_norm_t", "k_norm"),
        head_gates=("to_gate_logits",),
        second=(("add_q_proj", "to_add_out"), ("to_q_t", "to_out_t")),
        full_input=("norm_cross", "group_norm"),
    ),
    Attention(
        query=("q_proj",),
        key_value=("k_proj", "v_proj"),
        out=("o_proj", "out_proj"),
        query_norms=("q_norm",),
        key_norms=("k_norm", "v_norm"),
    ),
    Attention(query=("q",), key_value=("k", "v"), out=("o",), per_head=("relative_attention_bias",)),
    Attention(
        query=("to_query",),
        key_value=("to_key", "to_value"),
        out=("out_layer",),
        query_norms=("query_norm",),
        key_norms=("key_norm",),
    ),
)


@dataclass(frozen=True)
class FusedAttention:
    """Attention with queries, keys and values from one linear, one part after the other.

    classes: those known to have the parts in that order; shapes alone do not show it. by_head: whether each head has
    its query, key and value together instead. numbers: attributes for the number of query heads besides `HEAD_COUNTS`,
    such as one of the configuration ("config.NAME").
    """

    into: str
    out: str
    classes: tuple[str, ...]
    by_head: bool = False
    numbers: tuple[str, ...] = ()


HEAD_SIZES = ("head_dim", "key_value_proj_dim")
"""Attributes that give the channels of one head; without them they follow from the number of heads."""

FURTHER_HEAD_SIZES = ("dim_head", "dim_heads", "head_size")
"""Further ones, which some modules have for something else."""

HEAD_COUNTS = ("heads", "num_heads", "n_heads", "num_attention_heads")
"""Attributes for the number of query heads; existing ones are set to this rank's number."""

KEY_HEAD_COUNTS = ("kv_heads", "num_kv_heads", "num_key_value_heads")
"""Attributes for the number of key and value heads."""

KEY_GROUPS = ("num_key_value_groups",)
"""Attributes for the number of query heads that share a key head."""

QUERY_WIDTHS = ("inner_dim",)
"""Attributes for the channels of all query heads."""

KEY_WIDTHS = ("inner_kv_dim", "kv_inner_dim")
"""Attributes for the channels of all key and value heads."""


HIDDEN_WIDTHS = ("mlp_hidden_dim",)
"""Attributes for the hidden channels of a feed-forward."""


@dataclass(frozen=True)
class FeedForward:
    """Linears cut by columns, whose outputs are combined element by element, and the one cut by rows behind them.

    halves: full names of classes of the parent of `into[0]` whose output is split into two halves that are multiplied;
    whole: classes of such parents without the split. Empty: `into` are children of the module itself. gates: number of
    parts of the output of `into` there, which are multiplied. classes: the classes of the entry (empty: any).
    """

    into: tuple[str, ...]
    out: str
    whole: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    gates: int = 1
    classes: tuple[str, ...] = ()


FEED_FORWARDS = (
    FeedForward(("w1", "w3"), "w2"),
    FeedForward(("gate_proj", "up_proj"), "down_proj"),
    FeedForward(("gate", "up"), "down"),
    FeedForward(("wi_0", "wi_1"), "wo"),
    FeedForward(("wi",), "wo"),
    FeedForward(("fc1",), "fc2"),
    FeedForward(("in_layer",), "out_layer"),
)

FEED_FORWARD_KEPT = ("cond_proj",)
"""Parts of feed-forward modules that come before the first linear."""

ELEMENTWISE = (
    *(f"torch.nn.modules.activation.{name}" for name in ("SiLU", "GELU", "ReLU", "Tanh")),
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.dropout.Dropout",
)
"""Modules of torch that act on each element alone."""

EMBEDDING = "torch.nn.modules.sparse.Embedding"
"""The embedding table that can be cut by rows."""


@dataclass(frozen=True)
class ParallelBlock:
    """A block that runs attention and feed-forward side by side: out(cat([attention, act(into)])).

    width: the attribute with the channels of the feed-forward. into: has that many (so without the attribute) or,
    gated, twice as many. classes: those known to have attention first; shapes alone do not show it.
    """

    attention: str
    into: str
    out: str
    width: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class LatentAttention:
    """Attention with keys and values from a latent that all heads share; every rank has the whole latent.

    into: linears into heads, of which the last must exist; kept: parts before them; count: the attribute for the number
    of heads.
    """

    into: tuple[str, ...] = ("q_proj", "q_b_proj", "kv_b_proj")
    out: str = "o_proj"
    kept: tuple[str, ...] = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")
    count: str = "num_heads"


@dataclass(frozen=True)
class Experts:
    """Names of the weights of experts that are parameters of one module, with the experts in their first dimension.

    gated, plain: into the hidden channels, with or without gates; out: from them; bias: the ending of the names of
    biases. widths: attributes for the number of hidden channels. The following are flags, or attributes of the module
    for them. transposed: inputs come before outputs; halves: all gates come before all channels (otherwise in turn);
    biased, gates: there are biases, gates; normed: a norm follows each expert. classes: the classes of the entry
    (empty: any).
    """

    gated: str = "gate_up_proj"
    plain: str = "up_proj"
    out: str = "down_proj"
    bias: str = "_bias"
    widths: tuple[str, ...] = ("intermediate_dim", "intermediate_size")
    transposed: str | bool = "is_transposed"
    halves: str | bool = "is_concatenated"
    biased: str | bool = "has_bias"
    gates: str | bool = "has_gate"
    normed: str | bool = "has_post_expert_norm"
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChannelStates:
    """A state-space mixer with independent channels; channels and then gates come from one linear (`into`).

    channels: modules and parameters with an entry for each channel; the first is a convolution with a group for each
    channel. sums: linears from the channels; width: the attribute for their number.
    """

    classes: tuple[str, ...]
    into: str = "in_proj"
    channels: tuple[str, ...] = ("conv1d", "dt_proj", "A_log", "D")
    sums: tuple[str, ...] = ("x_proj", "out_proj")
    width: str = "intermediate_size"


@dataclass(frozen=True)
class HeadStates:
    """A state-space mixer with groups of heads that share an input and an output matrix. Gates, channels, both matrices
    of all groups and a step for each head come from one linear (`into`), in this order; channels and matrices pass a
    depthwise convolution.

    heads: parameters with an entry for each head. norm: over the channels of a group, after the product with the gates;
    it may be missing. scales: buffers with a factor for each output of `into`, in their last dimension.
    count, groups, state, width, mixed: attributes for the numbers of heads, groups, states, channels, and of channels
    and matrices together.
    """

    classes: tuple[str, ...]
    into: str = "in_proj"
    convolution: str = "conv1d"
    heads: tuple[str, ...] = ("dt_bias", "A_log", "D")
    norm: str = "norm"
    scales: tuple[str, ...] = ("mup_vector",)
    out: str = "out_proj"
    count: str = "num_heads"
    groups: str = "n_groups"
    state: str = "ssm_state_size"
    width: str = "intermediate_size"
    mixed: str = "conv_dim"


@dataclass(frozen=True)
class DeltaStates:
    """Linear attention with a state for each value head, such as the gated delta rule; equally many value heads share a
    key head. A module with these attributes and parts is one, and its first call shows whether it is.

    by_key: linears with everything of one key head after that of another. mixed: linears with queries, then keys, then
    values of all heads; these pass a depthwise convolution. channels: linears with the channels of values. by_value:
    linears, and parameters, with an entry for each value head. norm: over the channels of one value head. keys, values,
    key_size, value_size, key_width, value_width, mixed_width: attributes for the numbers of heads, of the channels of
    one head, of all heads, and of queries, keys and values together.
    """

    by_key: tuple[str, ...] = ("in_proj_qkvz", "in_proj_ba")
    mixed: tuple[str, ...] = ("in_proj_qkv",)
    channels: tuple[str, ...] = ("in_proj_z",)
    by_value: tuple[str, ...] = ("in_proj_b", "in_proj_a", "dt_bias", "A_log")
    convolution: str = "conv1d"
    norm: str = "norm"
    out: str = "out_proj"
    keys: str = "num_k_heads"
    values: str = "num_v_heads"
    key_size: str = "head_k_dim"
    value_size: str = "head_v_dim"
    key_width: str = "key_dim"
    value_width: str = "value_dim"
    mixed_width: str = "conv_dim"


GATHERED = (
    r"(^|\.)norm\w*\.linear$",
    r"(^|\.)adaLN_modulation(\.\d+)?$",
    r"(^|\.)(img|txt)_mod\.\d+$",
    r"(^|\.)\w*modulation\w*\.(linear|lin)$",
    r"(^|\.)time_proj$",
    r"(^|\.)lm_head$",
)
"""Linears with wide, short outputs (modulation, logits): cut by columns, outputs gathered. Correct for any linear; the
list has those for which it pays."""

VOCABULARY = 1024
"""Embeddings with at least this number of rows are cut by rows."""

RMS_NORM = "torch.nn.modules.normalization.RMSNorm"
"""torch's norm across all heads, which can be cut."""


@dataclass(frozen=True)
class Family:
    """Facts about the library of a model for tensor parallelism; passed in by the task that runs the model.

    attentions, feed_forwards, fused_attentions, latent_attentions, parallel_blocks, experts, channel_states,
    head_states, delta_states: rules that hold for its classes. gathered: patterns of names besides `GATHERED`.
    replicates_keys: whether ranks may have copies of key heads if there are fewer key heads than ranks. tries:
    whether modules that no rule names are cut as a trial shows, and further linears gathered. kept_attentions: models
    whose attention is left whole because other code of theirs relies on all heads, with the reason; kept_processors:
    the same for classes of attention processors. head_tables: by model, arguments of its attentions with tables that
    differ by head, which are cut with the heads (rotary tables); head_widths: by class of attention processor,
    attributes for the channels of all heads besides `QUERY_WIDTHS`; head_outputs: processors of which a result passes
    no linear behind the heads. rms_norms: full names of norms across all heads that can be cut like torch's.
    gathers_attentions: whether the attention weights that a model returns are gathered, so units may return those of
    their own heads. processors: the package of attention processors that store none of their results. unload_adapters:
    removes all adapters from a model, also those that were loaded in part. merging: the methods that merge adapters.
    libraries: packages whose hooks belong to a module. second_inputs: names of arguments for a second sequence of
    tokens, which code may need although it has a default; rotary_inputs: parts of names of those for rotary tables.
    """

    attentions: tuple[Attention, ...] = ()
    feed_forwards: tuple[FeedForward, ...] = ()
    fused_attentions: tuple[FusedAttention, ...] = ()
    latent_attentions: tuple[LatentAttention, ...] = ()
    parallel_blocks: tuple[ParallelBlock, ...] = ()
    experts: tuple[Experts, ...] = ()
    channel_states: tuple[ChannelStates, ...] = ()
    head_states: tuple[HeadStates, ...] = ()
    delta_states: tuple[DeltaStates, ...] = ()
    gathered: tuple[str, ...] = ()
    replicates_keys: bool = False
    tries: bool = False
    kept_attentions: Mapping[str, str] = field(default_factory=dict)
    kept_processors: Mapping[str, str] = field(default_factory=dict)
    head_tables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_widths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_outputs: tuple[str, ...] = ()
    rms_norms: tuple[str, ...] = ()
    gathers_attentions: bool = False
    processors: str = ""
    unload_adapters: Callable[[nn.Module], None] = lambda model: None
    merging: str = "merge_and_unload"
    libraries: tuple[str, ...] = ()
    second_inputs: tuple[str, ...] = ()
    rotary_inputs: tuple[str, ...] = ()
