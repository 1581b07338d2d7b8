"""The parallel axes for people who write their own models and pipelines: groups, ranks and sizes by name.

State of the process, set by `initialize_model_parallel`, and by `parallelize`, `load` and `Omni`'s ranks for the model
that was made parallel last. Everything in shardit itself gets its mesh passed in.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from shardit.config import TIMEOUT_S, DiffusionParallelConfig
from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.mesh import Mesh, init_mesh
from shardit.errors import InputError
from shardit.parallel.sequence.declared.model import runs_whole

_GROUPS: dict[str, GroupCoordinator] = {}
_MESH: list[Mesh] = []  # that the program itself has asked for
_IN_USE: list[Mesh] = []


def initialize_model_parallel(
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    ulysses_degree: int = 1,
    ring_degree: int = 1,
    cfg_parallel_size: int = 1,
    data_parallel_size: int = 1,
    *,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Make the groups of all axes. Collective over all ranks; starts the process group from the environment if there
    is none. Raises InputError if the world size is not the product of the sizes, and if called twice."""
    if _GROUPS:
        raise InputError("the parallel state is initialised already: call destroy_model_parallel() first")
    config = DiffusionParallelConfig(
        pipeline_parallel_size=pipeline_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        ulysses_degree=ulysses_degree,
        ring_degree=ring_degree,
        cfg_parallel_size=cfg_parallel_size,
        data_parallel_size=data_parallel_size,
    )
    set_mesh(init_mesh(config, timeout_s=timeout_s))


def set_mesh(mesh: Mesh) -> None:
    """Use the groups of a mesh that exists."""
    _MESH[:] = _IN_USE[:] = [mesh]
    _GROUPS.update(GroupCoordinator.of_mesh(mesh))


def set_mesh_of_model(mesh: Mesh) -> None:
    """Use the groups of the mesh of a model that was made parallel. Unlike after `set_mesh`, code outside of that model
    still runs whole (`own_mesh`)."""
    _MESH.clear()
    _IN_USE[:] = [mesh]
    _GROUPS.update(GroupCoordinator.of_mesh(mesh))


def own_mesh() -> Mesh | None:
    """Return the mesh of groups that the program itself has asked for."""
    return _MESH[0] if _MESH else None


def destroy_model_parallel() -> None:
    """Forget the groups. The process group itself stays."""
    _GROUPS.clear()
    _MESH.clear()
    _IN_USE.clear()


def model_parallel_is_initialized() -> bool:
    """Return whether there are groups."""
    return bool(_GROUPS)


def _group(name: str) -> GroupCoordinator:
    if not _GROUPS:
        raise InputError(
            "the parallel state is not initialised: call initialize_model_parallel() or parallelize() first"
        )
    if name in ("sp", "ulysses", "ring") and runs_whole():
        world = _GROUPS["world"]
        return GroupCoordinator(world.rank, (world.rank,), world.device, world.timeout)
    return _GROUPS[name]


def get_device_mesh() -> DeviceMesh:
    """Return the axes of more than one rank as torch's DeviceMesh, over the same groups, for code that takes one
    (DTensor, say). Raises InputError if there is one rank."""
    _group("world")
    return _IN_USE[0].device_mesh()


def get_world_group() -> GroupCoordinator:
    """Return all ranks."""
    return _group("world")


def get_pp_group() -> GroupCoordinator:
    """Return the stages of this rank's pipeline."""
    return _group("pp")


def get_tp_group() -> GroupCoordinator:
    """Return the ranks that share each linear layer."""
    return _group("tp")


def get_sp_group() -> GroupCoordinator:
    """Return the ranks that share the tokens: ring x ulysses, ulysses varying fastest."""
    return _group("sp")


def get_ulysses_group() -> GroupCoordinator:
    """Return the ranks that attention heads are distributed to."""
    return _group("ulysses")


def get_ring_group() -> GroupCoordinator:
    """Return the ranks that keys and values travel around."""
    return _group("ring")


def get_cfg_group() -> GroupCoordinator:
    """Return the ranks that the branches of guidance are distributed to."""
    return _group("cfg")


def get_dp_group() -> GroupCoordinator:
    """Return the copies of the model."""
    return _group("dp")


def get_pp_rank() -> int:
    """Return this rank's stage."""
    return get_pp_group().rank_in_group


def get_pp_world_size() -> int:
    """Number of stages."""
    return get_pp_group().world_size


def get_tp_rank() -> int:
    """Return this rank's place among those that share each linear layer."""
    return get_tp_group().rank_in_group


def get_tp_world_size() -> int:
    """Ranks that share each linear layer."""
    return get_tp_group().world_size


def get_sp_rank() -> int:
    """Return this rank's place among those that share the tokens."""
    return get_sp_group().rank_in_group


def get_sp_world_size() -> int:
    """Ranks that share the tokens."""
    return get_sp_group().world_size


def get_dp_rank() -> int:
    """Return the number of this rank's copy of the model."""
    return get_dp_group().rank_in_group


def get_dp_world_size() -> int:
    """Copies of the model."""
    return get_dp_group().world_size


def get_classifier_free_guidance_rank() -> int:
    """Return the number of this rank's branch of guidance."""
    return get_cfg_group().rank_in_group


def get_classifier_free_guidance_world_size() -> int:
    """Ranks that the branches of guidance are distributed to."""
    return get_cfg_group().world_size


get_pipeline_parallel_rank = get_pp_rank
get_pipeline_parallel_world_size = get_pp_world_size
get_tensor_model_parallel_rank = get_tp_rank
get_tensor_model_parallel_world_size = get_tp_world_size
get_sequence_parallel_rank = get_sp_rank
get_sequence_parallel_world_size = get_sp_world_size


def is_pipeline_first_stage() -> bool:
    """Return whether this rank holds the first blocks."""
    return get_pp_group().is_first_rank


def is_pipeline_last_stage() -> bool:
    """Return whether this rank holds the last blocks."""
    return get_pp_group().is_last_rank
