"""Flags of `shardit serve` and the options that follow from them."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from shardit.errors import InputError
from shardit.language.options import LanguageOptions
from shardit.models.tiny.cache import cache_root
from shardit.models.tiny.language import language_folder
from shardit.server.entry.serve import listening, locked, serve
from shardit.server.flags import ServeFlags
from shardit.server.jobs.store import Store
from shardit.server.keys import digest, owner_of


def options(**flags: Any) -> Any:
    return ServeFlags(model="tiny/flux", **flags).options()


@pytest.fixture(autouse=True)
def _no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDIT_API_KEY", raising=False)


def test_keys_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options().api_key_hashes == ()
    assert options(api_key=["alpha ", "beta"]).api_key_hashes == (digest("alpha"), digest("beta"))
    monkeypatch.setenv("SHARDIT_API_KEY", "gamma, delta,\n")
    assert options().api_key_hashes == (digest("gamma"), digest("delta"))
    assert options(api_key=["alpha"]).api_key_hashes == (digest("alpha"),)
    assert "gamma" not in repr(options())  # digests only
    assert owner_of("delta", options().api_key_hashes) == digest("delta")[:16]
    assert owner_of("alpha", options().api_key_hashes) is None


@pytest.mark.parametrize("told", [",", " ", " , "])
def test_invalid_keys_are_refused(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDIT_API_KEY", told)
    with pytest.raises(InputError, match="an API key must be"):
        options()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"api_key": [""]}, "an API key must be"),
        ({"api_key": ["two words"]}, "an API key must be"),
        ({"api_key": ["sch\xf6n"]}, "an API key must be"),
        ({"cors_origin": ["example.org"]}, "--cors-origin must be as in https://"),
        ({"cors_origin": ["*"]}, "--cors-origin must be as in https://"),
        ({"cors_origin": ["https://example.org/page"]}, "--cors-origin must be as in https://"),
        ({"fetch_host": ["https://example.org"]}, "--fetch-host must be a name"),
        ({"fetch_host": ["example.org:443"]}, "--fetch-host must be a name"),
        ({"served_model_name": " "}, "--served-model-name must be a name, without blanks around it"),
        ({"served_model_name": "my\nmodel"}, "--served-model-name must be a name, without blanks around it"),
        ({"host": ""}, "--host must be a name, without blanks around it"),  # sockets take it for all interfaces
        ({"queue_size": 0}, "--queue-size must be at least 1"),
        ({"jobs_per_key": 0}, "--jobs-per-key must be at least 1"),
        ({"max_in_flight": 0}, "--max-in-flight must be at least 1"),
        ({"max_pixels": 0}, "--max-pixels must be at least 1"),
        ({"max_frames": 0}, "--max-frames must be at least 1"),
        ({"max_steps": 0}, "--max-steps must be at least 1"),
        ({"step_timeout": 0}, "--step-timeout must be above 0"),
        ({"keep_days": float("nan")}, "--keep-days must be above 0"),
        ({"keep_gib": -1}, "--keep-gib must be above 0"),
        ({"fetch_host": ["127.0.0.1"]}, "--fetch-host 127.0.0.1 is a private address"),
        ({"port": 65536}, "--port must be from 0 to 65535"),
    ],
)
def test_mistakes_name_the_flag(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        options(**flags)
    assert "\n" not in str(caught.value)


def test_origins_and_hosts_are_as_browsers_write_them() -> None:
    made = options(cors_origin=["https://Good.Example/", "http://localhost:3000"], fetch_host=["Good.Example"])
    assert made.cors_origins == ("https://good.example", "http://localhost:3000")
    assert made.fetch_hosts == ("good.example",)


def test_every_flag_arrives() -> None:
    made = options(
        omni=True, host="0.0.0.0", port=0, served_model_name="a/name", max_in_flight=3, queue_size=4, jobs_per_key=5,
        keep_days=6, keep_gib=7, max_pixels=8, max_frames=9, max_steps=10, step_timeout=11, attention_backend="native",
        pipeline_parallel_size=2, layer_partition="4,8",
    )  # fmt: skip
    assert (made.host, made.port, made.name, made.max_in_flight, made.queue_size) == ("0.0.0.0", 0, "a/name", 3, 4)
    assert (made.keep_days, made.keep_bytes, made.step_timeout_s) == (6, 7 * 1024**3, 11)
    limits = made.limits
    assert (limits.jobs_per_key, limits.pixels, limits.frames, limits.steps) == (5, 8, 9, 10)
    assert (made.config.world_size, made.attention_backend) == (2, "native")
    assert options().host == "127.0.0.1"
    assert options().data_dir != options(served_model_name="a/name").data_dir
    assert options(omni=True) == options()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nobody)  # as in a container with a number for its user
    for name in ("HOME", "XDG_DATA_HOME", "SHARDIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert options(data_dir=tmp_path).data_dir == tmp_path
    with pytest.raises(InputError, match=r"no home folder.*give --data-dir"):
        options()
    with pytest.raises(InputError, match=r"no home folder.*SHARDIT_CACHE"):
        cache_root()
    with pytest.raises(InputError, match="--data-dir ~/x: there is no user of that name, or none with a home folder"):
        options(data_dir=Path("~/x"))


def test_homes_in_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "SHARDIT_CACHE"):
        monkeypatch.setenv(name, "~/x")
    assert options(data_dir=Path("~/x")).data_dir == cache_root() == tmp_path / "x"
    assert options().data_dir == tmp_path / "x" / "shardit" / "tiny--flux"


def test_addresses_that_are_not_here() -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(InputError, match="choose another with --host"), listening(host, 0):
            pass


def test_a_start_that_fails_for_its_port_leaves_nothing(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for folder in (tmp_path / "new", old):
            with pytest.raises(InputError, match="choose another with --port"):
                serve(options(data_dir=folder, port=taken.getsockname()[1]))
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


def test_folders_that_are_no_data_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for file in (model / "model_index.json", other / "jobs.sqlite"):
        file.parent.mkdir()
        file.touch()
    for folder, words in ((model, "holds a model"), (other / "jobs", "lies in that of a server")):
        with pytest.raises(InputError, match=f"{words}.*--data-dir"), locked(folder):
            pass
    assert [path.name for path in model.iterdir()] == ["model_index.json"]
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "jobs")
    with pytest.raises(InputError, match=r"Permission denied: '.*jobs'\); choose another with --data-dir"):
        Store(tmp_path / "data")


def test_one_server_at_a_time_holds_a_data_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "data") as was_killed:
        assert not was_killed
        with pytest.raises(InputError, match="is used by another server"), locked(tmp_path / "data"):
            pass
    for _ in range(2):  # the first one is killed, so to speak
        with pytest.raises(RuntimeError), locked(tmp_path / "data") as was_killed:
            raise RuntimeError
    assert was_killed
    with locked(tmp_path / "data") as was_killed:
        assert was_killed
    assert not (tmp_path / "data" / "lock").exists()


def test_a_single_file_is_the_model_that_clients_name(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").touch()
    file = str(tmp_path / "mine.safetensors")
    made = ServeFlags(model=file, config="tiny/flux").options()
    assert (made.model, made.name, made.loading.single_files) == ("tiny/flux", file, {"*": file})
    named = ServeFlags(model=file, config="tiny/flux", served_model_name="a/name")
    assert named.options().name == "a/name"


# Language models.


def test_the_folder_says_the_kind(tmp_path: Path) -> None:
    made = ServeFlags(model="tiny/llama", max_model_len=64, dtype="float32", pipeline_parallel_size=2).options()
    assert made.of_language
    assert (made.model, made.name, made.language.max_model_len) == ("tiny/llama", "tiny/llama", 64)
    assert made.data_dir.name == "tiny--llama"
    assert not options().of_language
    path = tmp_path / "model"
    folder = language_folder("tiny/llama")
    assert folder is not None
    shutil.copytree(folder, path)
    assert ServeFlags(model=str(path)).options().of_language


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"scheduler": "UniPCMultistepScheduler"}, "scheduler: tiny/llama holds a language model"),
        ({"vae_tiling": True}, "vae_tiling: tiny/llama holds a language model"),
        ({"attention_backend": "native"}, "attention_backend: tiny/llama holds a language model"),
        ({"cfg_parallel_size": 2}, "cfg_parallel_size=2: a language model runs over"),
        ({"pipeline_parallel_size": 5}, "4"),
        ({"tensor_parallel_size": 3}, "num_attention_heads"),
        ({"max_model_len": 513}, "max_model_len=513 is more than the 512 tokens"),
        ({"max_model_len": 0}, "--max-model-len must be at least 1"),
        ({"max_pixels": 2}, "--max-pixels: tiny/llama is a language model; leave it out"),
    ],
)
def test_what_a_language_model_does_not_take(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        ServeFlags(model="tiny/llama", **flags).options()


def test_a_pipeline_has_no_length() -> None:
    with pytest.raises(InputError, match="--max-model-len: tiny/flux is no language model"):
        options(max_model_len=64)


def test_limits_of_batches() -> None:
    flags: Any = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "kv_cache_memory": "64MiB"}
    made = ServeFlags(model="tiny/llama", **flags).options()
    assert made.language == LanguageOptions(None, 4, 16, 64 << 20)
    for name, value in flags.items():
        with pytest.raises(
            InputError, match=f"--{name.replace('_', '-')}: tiny/flux is no language model; leave it out"
        ):
            options(**{name: value})
    with pytest.raises(InputError, match="--kv-cache-memory must be a number of bytes, as in 2GiB"):
        ServeFlags(model="tiny/llama", kv_cache_memory="0").options()
