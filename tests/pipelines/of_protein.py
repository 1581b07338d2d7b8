"""RFD4-Proteina: structures of proteins."""

from __future__ import annotations

from typing import Any

import torch

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry

_TOKENS, _RESIDUES, _KINDS = 12, 147, 7


def _components() -> dict[str, Any]:
    atoms = [[(slot + residue) % 3 > 0 or slot == 1 for slot in range(37)] for residue in range(_RESIDUES)]
    vae = parts.model(
        "RFD4ProteinaAutoencoder",
        atom37_mask=atoms,
        allowed_residue_types=[[True] * _RESIDUES] * _KINDS,
        latent_dim=8,
        n_residue_types=_RESIDUES,
        num_token_types=_KINDS,
        nlayers=2,
        token_dim=32,
        nheads=2,
        dim_cond=16,
        pair_repr_dim=16,
        token_type_emb_dim=8,
        encoder_feats_seq=("token_type", "x1_a37coors_nm"),
    )
    net = parts.like("RFD4ProteinaTransformer")
    noise = {"tsr_k": 0.5, "tsr_sigma": 1.0, "tail_steps": 1}
    return {
        "transformer": net,
        "vae": vae,
        "bb_ca_scheduler": parts.scheduler("RFD4ProteinaScheduler", schedule_mode="log", noise_mode="1/t", **noise),
        "local_latents_scheduler": parts.scheduler(
            "RFD4ProteinaScheduler", schedule_mode="power", noise_mode="tan", **noise
        ),
        "recycle_depths": [1, 2, 1],
    }


def _call() -> dict[str, Any]:
    real = torch.ones(1, _TOKENS, dtype=torch.bool)
    real[:, -1] = False
    given = torch.zeros(1, _TOKENS, dtype=torch.bool)
    known = {"condition_sequence_1_residue": torch.zeros(1, _TOKENS, dtype=torch.long)}
    return {
        "padding_mask": real,
        "is_in_context_conditioning": given,
        "supports_local_latent": real.clone(),
        "token_type": torch.zeros(1, _TOKENS, dtype=torch.long),
        "conditioning_features": {**known, "molecule_iid": torch.zeros(1, _TOKENS, dtype=torch.long)},
    }


ENTRIES = (
    PipelineEntry("RFD4ProteinaPipeline", lambda: parts.pipeline("RFD4ProteinaPipeline", **_components()), _call),
)
