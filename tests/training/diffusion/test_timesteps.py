"""Timesteps: their distribution, the noise that belongs to them, and the expert that they are for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from statistics import NormalDist, quantiles
from typing import Any

import diffusers
import pytest
import torch

from shardit import InputError
from shardit.errors import UnsupportedError
from shardit.training.diffusion.noise import noise_of, uniform_of
from shardit.training.diffusion.objectives import Objective, objective_of
from shardit.training.diffusion.timesteps import Timesteps, timesteps_for
from tests.training.diffusion.folders import recipe_of

FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def drawn(timesteps: Timesteps, count: int = 2000, tokens: int = 64) -> list[float]:
    return [timesteps.quantile(uniform_of(seed), tokens) for seed in range(count)]


@pytest.mark.parametrize(
    ("kind", "shift", "closed"),
    [
        ("uniform", None, lambda p: p),
        ("logit-normal", None, lambda p: 1 / (1 + math.exp(-NormalDist().inv_cdf(p)))),
        ("shifted", 3.0, lambda p: 3 * p / (1 + 2 * p)),
        ("shifted", 0.5, lambda p: 0.5 * p / (1 - 0.5 * p)),
    ],
)
def test_draws_have_the_quantiles_of_the_closed_form(kind: str, shift: float | None, closed: Any) -> None:
    found = quantiles(drawn(timesteps_for(kind, shift, FLOW(shift=7.0), True)), n=10)
    for place, share in ((0, 0.1), (4, 0.5), (8, 0.9)):
        assert found[place] == pytest.approx(closed(share), abs=0.02)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("kind", ["uniform", "logit-normal", "shifted"])
def test_the_share_of_noise_is_the_timestep(kind: str, shift: float) -> None:
    """Whatever the scheduler's shift: nothing shifts a draw again."""
    scheduler = FLOW(shift=shift)
    objective = objective_of(scheduler)
    times = [objective.timestep(share) for share in drawn(timesteps_for(kind, None, scheduler, True), 400)]
    given = torch.tensor(times, dtype=torch.float32)
    clean, noise = torch.zeros(400, 1, dtype=torch.float64), torch.ones(400, 1, dtype=torch.float64)
    a, b = objective._shares(given, clean)
    assert (b[:, 0] * 1000 - given.double()).abs().max() < 1e-6
    assert (a + b - 1).abs().max() < 1e-12
    assert torch.equal(objective.noised(clean, noise, given), b.float())
    assert torch.equal(objective.target(clean, noise, given), noise - clean)


def test_a_shift_comes_from_the_settings_or_the_scheduler() -> None:
    unipc = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    assert timesteps_for("shifted", None, unipc, True).shift == 5.0
    assert timesteps_for("shifted", 2.0, unipc, True).shift == 2.0
    assert timesteps_for("shifted", None, FLOW(shift=3.0), True).shift == 3.0
    assert timesteps_for("uniform", None, FLOW(shift=3.0), True).shift is None


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_by_size_is_that_of_the_scheduler(kind: str) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FLOW(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, time_shift_type=kind)  # type: ignore
    dynamic = timesteps_for("shifted", None, scheduler, True)
    for tokens in (256, 1000, 4096):
        scheduler.set_timesteps(sigmas=[0.8, 0.4], mu=calculate_shift(tokens, 256, 8192, 0.5, 0.9))  # type: ignore
        got = [dynamic.quantile(share, tokens) for share in (0.8, 0.4)]
        assert got == pytest.approx(scheduler.sigmas[:2].tolist(), abs=1e-6)
    assert dynamic.quantile(0.5, 256) != dynamic.quantile(0.5, 4096)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_other_objectives_are_those_of_the_scheduler(prediction: str) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, beta_schedule="scaled_linear")  # type: ignore
    objective = objective_of(scheduler)
    assert objective.kind == prediction
    times = [objective.timestep(share) for share in (0.0, 0.3333, 0.5, 0.999999)]
    assert times == [0.0, 333.0, 500.0, 999.0]
    given = torch.tensor(times)
    clean, noise = noise_of(range(4), (2, 3)), noise_of(range(4, 8), (2, 3))
    torch.testing.assert_close(objective.noised(clean, noise, given), scheduler.add_noise(clean, noise, given.long()))
    velocity = scheduler.get_velocity(clean, noise, given.long())
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction]
    torch.testing.assert_close(objective.target(clean, noise, given), expected)


def test_two_experts_share_the_schedule(tmp_path: Path) -> None:
    made = recipe_of("wan2.2-t2v", tmp_path, accumulation=200, batch_size=2)
    batches = made.micro_batches(0, 0, 1)
    times: dict[str, list[float]] = {"transformer": [], "transformer_2": []}
    for batch in batches:
        times[batch.model] += batch.data["times"].tolist()
        assert len(batch.data["times"]) == len(batch.items) == batch.weight
    assert sum(map(len, times.values())) == 400
    assert min(times["transformer"]) >= 875 > max(times["transformer_2"])
    assert len(times["transformer"]) / 400 == pytest.approx(0.3, abs=0.06)  # the scheduler's shift is 3
    assert "timesteps: uniform with shift 3" in made.notes
    again = made.micro_batches(0, 0, 1)
    assert [one.data["times"].tolist() for one in again] == [one.data["times"].tolist() for one in batches]


def test_noise_is_of_the_sample_alone() -> None:
    together = noise_of([5, 6], (4, 3))
    assert torch.equal(together[1:], noise_of([6], (4, 3)))
    assert not torch.equal(together[0], together[1])
    assert uniform_of(5) == uniform_of(5) != uniform_of(6)


@pytest.mark.parametrize(
    ("kind", "shift", "flow", "text"),
    [
        ("cubic", None, True, "timesteps='cubic' must be one of uniform, logit-normal, shifted"),
        ("uniform", 2.0, True, "shift=2 has no effect with timesteps='uniform'"),
        ("shifted", None, False, "needs a flow-matching model"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, shift: float | None, flow: bool, text: str) -> None:
    with pytest.raises(InputError, match=text):
        timesteps_for(kind, shift, FLOW(), flow)


def test_a_scheduler_without_an_objective_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="EDMEulerScheduler with no alphas_cumprod cannot be trained"):
        objective_of(diffusers.EDMEulerScheduler())
    assert dataclasses.replace(Objective("flow", 1000), steps=10).timestep(0.5) == 5.0
