"""Parts of a run by themselves: rates, optimizers, averages, what may differ when a run goes on, rows of metrics."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from shardit import InputError
from shardit.config import DiffusionParallelConfig
from shardit.training.recipe import TrainingRecipe
from shardit.training.run.report import Report, cut
from shardit.training.run.resume import compare, record_of
from shardit.training.run.steps.average import Average
from shardit.training.run.steps.optimizers import (
    found_by,
    make_optimizer,
    set_found,
    set_state,
    state_of,
    try_optimizer,
)
from shardit.training.run.steps.rates import check_warmup, rate
from shardit.training.run.steps.sharded import share_out
from shardit.training.run.steps.trained import step_seed
from shardit.training.settings import TrainSettings


@pytest.mark.parametrize(("name", "of_diffusers"), [("constant", "constant_with_warmup"), ("cosine", "cosine")])
@pytest.mark.parametrize("warmup", [0, 1, 4, 20])
def test_rates_are_those_of_diffusers(name: str, of_diffusers: str, warmup: int) -> None:
    _compare_rates(name, of_diffusers, warmup)


@pytest.mark.parametrize("warmup", [0, 4])
def test_linear_rates_are_those_of_diffusers(warmup: int) -> None:
    _compare_rates("linear", "linear", warmup)


def _compare_rates(name: str, of_diffusers: str, warmup: int) -> None:
    settings = TrainSettings(learning_rate=3e-3, lr_schedule=name, warmup_steps=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    plain = get_scheduler(of_diffusers, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        assert rate(settings, step, 20) == pytest.approx(plain.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        plain.step()


def test_a_warm_up_ends_within_the_run() -> None:
    check_warmup(TrainSettings(warmup_steps=20), 20)
    with pytest.raises(InputError, match=r"warmup_steps=21 is more than steps=20: give fewer, or more steps"):
        check_warmup(TrainSettings(warmup_steps=21), 20)
    with pytest.raises(InputError, match=r"more than steps=20 \(2 epochs\): give fewer, or more epochs"):
        check_warmup(TrainSettings(warmup_steps=21, epochs=2), 20)


def parameters(count: int = 2) -> dict[str, nn.Parameter]:
    torch.manual_seed(1)
    return {f"m/{number}": nn.Parameter(torch.randn(4, 3)) for number in range(count)}


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_an_optimizer_goes_on_bit_by_bit(name: str) -> None:
    more = {"momentum": 0.9} if name == "sgd" else {}
    settings = TrainSettings(optimizer=name, learning_rate=0.1, optimizer_args=more)
    plain, torn = parameters(), parameters()
    whole, parts = make_optimizer(settings, plain), make_optimizer(settings, torn)
    assert whole is not None
    assert parts is not None
    for step in range(6):
        if step == 3:  # another optimizer takes over, with the state of the first
            before = {key: dict(value) for key, value in state_of(parts, torn).items()}
            assert before
            parts = make_optimizer(settings, torn)
            assert parts is not None
            for key, state in before.items():
                set_state(parts, torn[key], state)
        for group, optimizer in ((plain, whole), (torn, parts)):
            for number, one in enumerate(group.values()):
                one.grad = torch.full_like(one, 0.1 * (number + step + 1))
            optimizer.step()
    assert all(torch.equal(plain[key], torn[key]) for key in plain)
    assert not torch.equal(plain["m/0"], parameters()["m/0"])


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_an_optimizer_treats_each_tensor_by_itself(name: str) -> None:
    """So that stages, which have a part of the parameters each, do as one rank does."""
    settings = TrainSettings(optimizer=name, learning_rate=0.1)
    whole, parts = parameters(), parameters()
    optimizers = [make_optimizer(settings, whole), *(make_optimizer(settings, {key: parts[key]}) for key in parts)]
    for step in range(3):
        for group in (whole, parts):
            for number, one in enumerate(group.values()):
                one.grad = torch.full_like(one, 10.0**number * (step + 1))
        for optimizer in optimizers:
            assert optimizer is not None
            optimizer.step()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_arguments_of_optimizers_are_checked_on_every_stage() -> None:
    for some in (parameters(), {}):
        for arguments, part in (
            ({"bettas": 1}, "did you mean 'betas'"),
            ({"lr": 1}, "give learning_rate"),
            ({"weight_decay": 1}, "give weight_decay"),
            ({"betas": [2, 0.9]}, "AdamW refuses them"),
            ({"betas": [0.9]}, r"betas must be a list of 2 numbers, got \[0.9\]"),
            ({"betas": 0.9}, "betas must be a list of 2 numbers, got 0.9"),
            ({"betas": ["a", 1]}, "betas must be a list of 2 numbers"),
            ({"eps": "x"}, "eps must be a number, such as 1e-08, got 'x'"),
            ({"amsgrad": 1}, "amsgrad must be true or false, got 1"),
            ({"fused": "maybe"}, "fused must be true or false, got 'maybe'"),
        ):
            with pytest.raises(InputError, match=part):
                make_optimizer(TrainSettings(optimizer_args=arguments), some)
    assert make_optimizer(TrainSettings(optimizer_args={"betas": [0.8, 0.9]}), {}) is None
    with pytest.raises(InputError, match="optimizer_args: adamw makes no step"):
        try_optimizer(TrainSettings(optimizer_args={"differentiable": True}), torch.device("cpu"))
    try_optimizer(TrainSettings(), torch.device("cpu"))


class Prodigy(torch.optim.Optimizer):
    """Stands for the class of prodigyopt: a step size found from all parameters is kept in the group."""

    def __init__(self, params: Any, lr: float = 1.0, weight_decay: float = 0.0, d0: float = 1e-6):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "d0": d0, "d": d0, "k": 0})

    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        group["k"] += 1
        group["d"] = max(group["d"], 1e-3 * group["k"])
        for one in group["params"]:
            one.data.add_(one.grad, alpha=-group["lr"] * group["d"])


def test_what_an_optimizer_has_found_for_all_parameters_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", types.SimpleNamespace(Prodigy=Prodigy))
    settings = TrainSettings(optimizer="prodigy", learning_rate=1.0, optimizer_args={"d0": 1e-5})
    some = parameters()
    first, second = make_optimizer(settings, some), make_optimizer(settings, some)
    assert first is not None
    assert second is not None
    for one in some.values():
        one.grad = torch.ones_like(one)
    first.step()
    first.step()
    found = found_by(first)
    assert found == {"d": 2e-3, "k": 2}
    second.param_groups[0]["lr"] = 0.5
    set_found(second, {**found, "d0": 7.0, "lr": 3.0})
    assert {key: second.param_groups[0][key] for key in ("d", "k", "d0", "lr")} == {
        **found,
        "d0": 1e-5,
        "lr": 0.5,
    }


def test_the_state_of_adamw8bit_is_kept() -> None:
    pytest.importorskip("bitsandbytes")
    settings = TrainSettings(optimizer="adamw8bit")
    some, twins = ({"small": nn.Parameter(torch.ones(8)), "large": nn.Parameter(torch.ones(128, 64))} for _ in range(2))
    first, second = make_optimizer(settings, some), make_optimizer(settings, twins)
    assert first is not None
    assert second is not None
    for step in range(4):
        if step == 2:
            for name, twin in twins.items():
                twin.data.copy_(some[name])
                set_state(second, twin, state_of(first, some)[name])
        for number, one in enumerate((*some.values(), *twins.values())):
            one.grad = torch.linspace(-1, 1, one.numel()).view_as(one) * (step + 1 + number % 2)
        first.step()
        if step >= 2:
            second.step()
    assert all(torch.equal(some[name], twins[name]) for name in some)
    assert not torch.equal(some["large"], torch.ones(128, 64))


def test_events_for_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int):
            seen.append((folder, purge_step))

        def add_scalar(self, *event: Any) -> None:
            seen.append(event)

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setenv("SHARDIT_PROGRESS", "0")
    report = Report(tmp_path, True, 5, 2, True)
    report.row({"step": 3, "loss": 0.5, "lr": 0.1, "items": ["a"], "held_out_loss": None})
    report.close()
    folder = str(tmp_path / "tensorboard")
    assert seen == [(folder, 3), ("train/loss", 0.5, 3), ("train/lr", 0.1, 3), "closed"]
    Report(tmp_path / "none", False, 5, 2, True).row({"step": 3})
    assert len(seen) == 4


def test_tensorboard_reads_the_events_of_a_run_that_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("SHARDIT_PROGRESS", "0")
    for done, steps, loss in ((0, (1, 2, 3, 4), 0.5), (2, (3,), 0.25)):
        report = Report(tmp_path, True, 5, done, True)
        for step in steps:
            report.row({"step": step, "loss": loss, "lr": 0.1, "items": ["a"], "held_out_loss": None})
        report.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/lr"}
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_progress_is_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, True, 60, 0, False)
    for step in range(1, 61):
        report.row({"step": step, "loss": None if step == 3 else 0.5, "lr": 1e-4})
    report.print_line("done")
    report.close()
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[:2] == ["step 1 of 60: loss 0.5, lr 0.0001", "step 3 of 60: loss nan, lr 0.0001"]
    assert len(lines) == 21
    assert said.out == "done\n"


def test_an_average_is_swapped_in_and_out() -> None:
    some = parameters()
    average, expected = Average(0.9, some), {key: one.detach().clone() for key, one in some.items()}
    for count in range(30):
        with torch.no_grad():
            for one in some.values():
                one.add_(1)
        average.update()
        decay = min(0.9, (1 + count) / (10 + count))
        expected = {key: decay * value + (1 - decay) * some[key].detach() for key, value in expected.items()}
    before = {key: one.detach().clone() for key, one in some.items()}
    with average.in_place():
        assert all(torch.allclose(some[key], expected[key], atol=1e-5) for key in some)
        assert not torch.allclose(some["m/0"], before["m/0"], atol=1)
    assert all(torch.equal(some[key], before[key]) for key in some)


def record(replicas: int = 1, identity: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    def none(*_: Any) -> Any: ...

    recipe = TrainingRecipe({}, none, none, 1.0, identity or {"texts": 3}, none)
    return record_of(TrainSettings(**given), DiffusionParallelConfig(data_parallel_size=replicas), recipe)


def test_what_may_differ_when_a_run_goes_on() -> None:
    folder = Path("run")
    assert compare(record(), record(), folder) == []
    assert compare(record(2, accumulation=2), record(4, accumulation=1), folder) == []
    assert compare(record(), record(save_every=3, keep=1, output=Path("x"), timeout_s=3.0), folder) == []
    (note,) = compare(record(), record(learning_rate=3e-4), folder)
    assert "learning_rate was 0.0001 and is 0.0003" in note
    (note,) = compare(record(steps=3), record(steps=5), folder)
    assert "steps was 3 and is 5" in note
    for before, now, part in (
        (record(), record(batch_size=3), "batch_size was 1 and is 3"),
        (record(), record(lora_rank=3), "lora_rank was 16 and is 3"),
        (record(), record(seed=3), "seed was 0 and is 3"),
        (record(caption_dropout=0.5), record(), "caption_dropout was 0.5 and is 0.0"),
        (record(lora_targets=("a",)), record(lora_targets=("a", "b")), "lora_targets"),
        (record(2, accumulation=4), record(4, accumulation=4), "use accumulation=2"),
        (record(3, accumulation=1), record(2, accumulation=1), "use data_parallel_size=3"),
        (record(identity={"texts": 3}), record(identity={"texts": 4}), "texts was 3 and is 4"),
        (record(identity={"a": 3}), record(identity={"a": 3, "b": 4}), "b was None and is 4"),
    ):
        with pytest.raises(InputError) as error:
            compare(before, now, folder)
        assert part in str(error.value)
        assert "\n" not in str(error.value)


def test_a_model_that_was_moved_is_the_same(tmp_path: Path) -> None:
    (first := tmp_path / "first").mkdir()
    (first / "config.json").write_text("{}")
    weights = bytearray(range(256)) * 10_000
    (first / "model.safetensors").write_bytes(weights)
    shutil.copytree(first, tmp_path / "copy")
    shutil.copytree(first, tmp_path / "tuned")
    (tmp_path / "tuned" / "model.safetensors").write_bytes(bytes(255 - one for one in weights))
    shutil.copytree(first, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"layers": 3}')
    before = record(model=str(first))
    (note,) = compare(before, record(model=str(tmp_path / "copy")), tmp_path)
    assert f'model was "{first}'[:60] in note
    shutil.rmtree(first)  # its digest is that of the checkpoint
    (note,) = compare(before, record(model=str(tmp_path / "copy")), tmp_path)
    for model in (str(tmp_path / "tuned"), str(tmp_path / "other"), "tiny/flux", "one/hub-id"):
        with pytest.raises(InputError, match="model was"):
            compare(before, record(model=model), tmp_path)
    with pytest.raises(InputError, match="model was"):
        compare(record(model="tiny/flux"), record(model="one/hub-id"), tmp_path)
    old = {name: value for name, value in before.items() if name != "model_contents"}
    with pytest.raises(InputError, match="model was"):
        compare(old, record(model=str(tmp_path / "copy")), tmp_path)


@pytest.mark.parametrize("part", ["", "transformer"])
def test_other_weights_in_the_same_place_are_another_model(part: str, tmp_path: Path) -> None:
    """A result below the folder is no part of the model."""
    (model := tmp_path / "model").mkdir()
    (model / part).mkdir(exist_ok=True)
    (model / ("model_index.json" if part else "config.json")).write_text('{"transformer": ["diffusers", "Model"]}')
    file = model / part / "model.safetensors"
    file.write_bytes(b"1" * 1000)
    before = record(model=str(model))
    (model / "my-lora" / "checkpoints").mkdir(parents=True)
    (model / "my-lora" / "checkpoints" / "run.json").write_text("{}")
    assert compare(before, record(model=str(model)), tmp_path) == []
    file.write_bytes(b"2" * 1000)
    with pytest.raises(InputError, match=f"--resume: {model} has other weights or configurations than when"):
        compare(before, record(model=str(model)), tmp_path)
    old = {name: value for name, value in before.items() if name != "model_contents"}
    assert compare(old, record(model=str(model)), tmp_path) == []


def test_a_hub_id_at_another_commit_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--one--model"
    commits = [digit * 40 for digit in "abc"]
    for commit, weights in zip(commits, (b"1", b"2", b"1"), strict=True):
        (folder := root / "snapshots" / commit).mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights * 1000)
    (root / "refs").mkdir()

    def at(commit: str) -> dict[str, Any]:
        (root / "refs" / "main").write_text(commit)
        return record(model="one/model")

    first, second, alike = commits
    before = at(first)
    assert compare(before, at(first), tmp_path) == []
    assert compare(before, at(alike), tmp_path) == []
    with pytest.raises(InputError, match=f"one/model is at commit {second} on the hub, .* at {first}, .* --model /"):
        compare(before, at(second), tmp_path)
    (note,) = compare(before, record(model=str(root / "snapshots" / first)), tmp_path)
    assert 'model was "one/model"' in note
    (root / "snapshots" / first / "more.json").write_text("{}")
    assert compare(before, at(first), tmp_path) == []
    old = {name: value for name, value in before.items() if name not in ("model_contents", "model_snapshot")}
    assert compare(old, at(second), tmp_path) == []


def test_rows_after_a_checkpoint_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    cut(file, 3)
    assert not file.exists()
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    cut(file, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    file.write_text('{"step": 1}\n{"step": 2}')
    cut(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut(file, 0)
    assert file.read_text() == ""


def test_names_with_separators_of_lines_keep_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDIT_PROGRESS", "0")
    report = Report(tmp_path, True, 5, 0, False)
    report.row({"step": 1, "loss": 1.0, "lr": 0.1, "items": ["a\u2028b\x85c.txt"]})
    report.close()
    file = tmp_path / "metrics.jsonl"
    before = file.read_bytes()
    cut(file, 1)
    assert file.read_bytes() == before != b""


def test_parameters_are_shared_out_evenly() -> None:
    some = {name: nn.Parameter(torch.zeros(size)) for name, size in zip("abcdef", (5, 1, 4, 3, 2, 3), strict=True)}
    owners = share_out(some, 2)
    assert owners == share_out(dict(reversed(some.items())), 2)
    assert [sum(some[name].numel() for name in some if owners[name] == replica) for replica in (0, 1)] == [9, 9]
    assert set(share_out({"a": some["a"]}, 3).values()) == {0}


def test_each_step_has_its_own_seed() -> None:
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= one < 2**63 for one in seeds)
