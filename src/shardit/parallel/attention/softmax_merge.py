"""Attention over a part of the keys, and the merge of such parts by the log-sum-exp of the scores.

All tensors are [batch, tokens, heads, width] (BSHD); a log-sum-exp is [batch, heads, tokens] in float32. Merging by
log-sum-exp is due to Milakov and Gimelshein, "Online normalizer calculation for softmax", and FlashAttention.
"""

from __future__ import annotations

import math
from typing import Any

import torch

Partial = tuple[torch.Tensor, torch.Tensor]
"""Output in the dtype of the queries or in float32, and log-sum-exp; -inf if every key is masked for a query."""


def partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool = False,
) -> Partial:
    """Attend with q to k and v, which have the same number of heads. mask: 4 dimensions that broadcast to [batch,
    heads, queries, keys], bool (False hides) or added to the scores. causal: query i attends to keys 0 to i; only
    without a mask."""
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    bias = None if mask is None else _as_bias(mask, q.dtype)
    kernel = _kernel(q, k, v, bias)
    out, lse = kernel(*heads_first, bias, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, causal)
    if bias is not None:  # kernels return arbitrary values for a query whose keys are all masked
        blind = (bias == -math.inf).all(-1)  # [batch or 1, heads or 1, queries or 1]
        lse = lse.masked_fill(blind, -math.inf)
        out = out.masked_fill(blind.unsqueeze(-1), 0)
    return out.transpose(1, 2), lse


def merge(one: Partial, other: Partial, last: bool = False) -> Partial:
    """Merge the attention over two sets of keys. With `last` the log-sum-exp is not needed any more and not
    computed."""
    (out, lse), (more, more_lse) = one, other
    # exp(more_lse) / (exp(lse) + exp(more_lse)); NaN if all keys of both are masked: there both outputs are zero.
    weight = torch.sigmoid(more_lse - lse).nan_to_num_(0.0)
    weight = weight.transpose(1, 2).unsqueeze(-1)
    out = torch.lerp(out.float(), more.float(), weight)
    return out, lse if last else torch.logaddexp(lse, more_lse)


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def _kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> Any:
    if 0 in q.shape or 0 in k.shape or q.shape[-1] != v.shape[-1]:
        return _math
    if q.device.type == "cpu":
        return _flash_cpu
    if q.device.type == "cuda" and q.shape[-1] % 8 == 0:
        half = q.dtype in (torch.float16, torch.bfloat16)
        if half and bias is None and q.shape[-1] <= 256:
            return _flash_cuda
        if half or q.dtype is torch.float32:
            return _efficient_cuda
    return _math


def _flash_cpu(q: Any, k: Any, v: Any, bias: Any, scale: float, causal: bool) -> Partial:
    if bias is not None:
        bias = bias.expand(-1, -1, q.shape[2], k.shape[2])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    return out, lse


def _flash_cuda(q: Any, k: Any, v: Any, bias: Any, scale: float, causal: bool) -> Partial:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse[..., : q.shape[2]]


def _efficient_cuda(q: Any, k: Any, v: Any, bias: Any, scale: float, causal: bool) -> Partial:
    if bias is not None:  # rows must begin at multiples of 16 bytes
        padded = torch.nn.functional.pad(bias, (0, -bias.shape[-1] % 8))
        bias = padded[..., : bias.shape[-1]].expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = efficient(q, k, v, bias, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]


def _math(q: Any, k: Any, v: Any, bias: Any, scale: float, causal: bool) -> Partial:
    """Compute in float32 with all scores in memory: for shapes without a kernel."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(future, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return (weights @ v.float()).to(q.dtype), lse
