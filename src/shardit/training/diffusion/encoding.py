"""`Encoding`: the components that encode, of which a rank holds as little as possible, and only while they are needed.

The VAE is small, and encodes for longest: every rank has it, and encodes a share of the items. Text encoders are large:
the ranks of a replica hold them together, as for inference (large ones by layers, others on the rank with the fewest
bytes), and encode each caption together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import Mesh
from shardit.core.comm.p2p import Comm
from shardit.core.components.layerwise import cut_layerwise
from shardit.core.components.owned import empty, make_owned
from shardit.core.modules.absent import mark_absent
from shardit.core.modules.hooks import add_libraries
from shardit.diffusion.family import FAMILY, LIBRARIES
from shardit.diffusion.loading.pipeline import load_component
from shardit.diffusion.sharding.components import shared_tensors
from shardit.diffusion.sharding.layout import lay_out
from shardit.training.diffusion.cache import Team
from shardit.training.diffusion.components import Parts

VAE = "vae"


@dataclass
class Encoding:
    """Loads what encodes when it is first needed. whole: each rank has all text encoders, which are trained. All
    methods are collective over the ranks of a replica."""

    parts: Parts
    mesh: Mesh
    whole: bool = False
    _loaded: set[str] = field(default_factory=set)

    @property
    def team(self) -> Team | None:
        """The ranks that encode a caption together; None: each rank encodes for itself."""
        if self.whole or self.mesh.replica.world_size == 1:
            return None
        return Team(self.mesh.replica, self.mesh.coords["dp"], self.mesh.sizes["dp"])

    def load_vae(self) -> None:
        """Load the VAE whole, unless it is there."""
        self._load_whole((VAE,))

    def load_encoders(self) -> None:
        """Load this rank's share of all other components that are not trained, unless it is there."""
        parts = self.parts
        names = tuple(name for name in parts.prepared.modules if name != VAE and name not in parts.trained)
        if self.team is None:
            self._load_whole(names)
        elif not self._loaded.issuperset(names):
            self._load_shares(names)
            self._loaded.update(names)

    def drop_vae(self) -> None:
        """Release the memory of the VAE."""
        if VAE in self._loaded:
            empty(self.parts.encoding.vae, ())
            self._loaded.remove(VAE)

    def _load_whole(self, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self._loaded:
                self._register(name, load_component(self.parts.prepared, name, lambda _: True, device=self.mesh.device))
                self._loaded.add(name)

    def _load_shares(self, names: tuple[str, ...]) -> None:
        """Load and connect the components that the ranks of a replica hold together."""
        parts, ranks = self.parts, self.mesh.replica
        modules = {name: parts.prepared.modules[name] for name in names}
        config = DiffusionParallelConfig(pipeline_parallel_size=ranks.world_size)
        found = lay_out(modules, parts.prepared.cls, config).assignment
        for name in names:
            owned = found.owns(name, ranks.rank_in_group)
            self._register(name, load_component(parts.prepared, name, owned, device=self.mesh.device))
        add_libraries(FAMILY.libraries)
        loaded = {name: getattr(parts.encoding, name) for name in names}
        comm, shared = Comm(ranks), shared_tensors(loaded)
        for name, owner in found.owned.items():
            make_owned(loaded[name], comm, owner, found.small.get(name, ()), (), shared)
        for name, layers in found.layerwise.items():
            cut_layerwise(loaded[name], comm, layers.units, layers.owners, (), shared)
        for name in names:
            loaded[name].shardit_boundary.libraries = LIBRARIES.own
            mark_absent(loaded[name], self.mesh.device, LIBRARIES)

    def _register(self, name: str, module: nn.Module) -> None:
        self.parts.encoding.register_modules(**{name: module})
