"""Names of vllm that vLLM-Omni's transformer for Wan uses, for a CPU.

Its linears have the same split over tensor ranks and the same sums here, on plain torch and gloo.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

ranks = SimpleNamespace(rank=0, count=1)
"""This rank's place among those that share each linear, for the model that is made or run right now."""


def own(whole: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """This rank's slice of a weight."""
    return whole.chunk(ranks.count, dim)[ranks.rank]


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over tensor ranks, in place as in vllm."""
    if ranks.count > 1:
        dist.all_reduce(tensor)
    return tensor


class Linear(nn.Linear):
    """vllm loads weights by a method that is an attribute of each parameter, and can return the bias apart."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, return_bias: bool = True, **_: Any):
        super().__init__(inputs, outputs, bias)
        self.return_bias = return_bias
        for parameter in self.parameters():
            parameter.weight_loader = self.load

    def forward(self, x: torch.Tensor) -> Any:
        out = self.product(x)
        return (out, None) if self.return_bias else out

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class ColumnParallelLinear(Linear):
    """A rank has some of the outputs."""

    def __init__(self, inputs: int, outputs: int, **options: Any):
        super().__init__(inputs, outputs // ranks.count, **options)

    def load(self, parameter: Any, whole: torch.Tensor) -> None:
        parameter.data.copy_(own(whole))


class QKVParallelLinear(Linear):
    """Queries, keys and values of a rank's heads, in one product."""

    def __init__(self, hidden_size: int, head_size: int, total_num_heads: int, **options: Any):
        heads = total_num_heads // ranks.count
        super().__init__(hidden_size, 3 * heads * head_size, **options)
        self.num_heads = self.num_kv_heads = heads

    def load(self, parameter: Any, whole: torch.Tensor, shard: str) -> None:
        parameter.data.chunk(3)["qkv".index(shard)].copy_(own(whole))


class RowParallelLinear(Linear):
    """A rank has some of the inputs; outputs are summed."""

    def __init__(self, inputs: int, outputs: int, **options: Any):
        super().__init__(inputs // ranks.count, outputs, **options)

    def load(self, parameter: Any, whole: torch.Tensor) -> None:
        parameter.data.copy_(own(whole, 1) if whole.ndim == 2 else whole)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(F.linear(x, self.weight, self.bias if ranks.rank == 0 else None))


def _make_layers(count: int, make: Callable[..., nn.Module], prefix: str) -> tuple[int, int, nn.ModuleList]:
    return 0, count, nn.ModuleList(make(prefix=f"{prefix}.{number}") for number in range(count))


def _logger(name: str) -> Any:
    logger: Any = logging.getLogger(name)
    logger.warning_once, logger.info_once = logger.warning, logger.info
    return logger


class Platform:
    """No GPU: `is_cuda()` and all other questions have the answer None."""

    device_name = device_type = "cpu"

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def get_diffusion_attn_backend_cls(self, **_: Any) -> str:
        return "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"

    def supports_float64(self) -> bool:
        return True


NAMES: dict[str, dict[str, Any]] = {
    "vllm.distributed": {
        "get_tensor_model_parallel_rank": lambda: ranks.rank,
        "get_tensor_model_parallel_world_size": lambda: ranks.count,
        "tensor_model_parallel_all_reduce": all_reduce,
    },
    "vllm.logger": {"init_logger": _logger},
    "vllm.model_executor.layers.conv": {"Conv3dLayer": nn.Conv3d},
    "vllm.model_executor.layers.linear": {
        "ColumnParallelLinear": ColumnParallelLinear,
        "QKVParallelLinear": QKVParallelLinear,
        "RowParallelLinear": RowParallelLinear,
    },
    "vllm.model_executor.model_loader.weight_utils": {
        "default_weight_loader": lambda parameter, whole: parameter.data.copy_(whole)
    },
    "vllm.model_executor.models.utils": {
        "extract_layer_index": lambda prefix: int(prefix.split(".")[1]),
        "is_pp_missing_parameter": lambda *_: False,
        "make_empty_intermediate_tensors_factory": lambda *_: None,
        "make_layers": _make_layers,
    },
    "vllm_omni.platforms": {"current_omni_platform": Platform()},
}
"""By module. All other names of vllm can be imported too, and are empty classes."""
