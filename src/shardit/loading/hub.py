"""Downloads from the Hugging Face hub only the files that a pipeline needs, and reads weight headers without the
weights.

Endpoint, token, cache folder and offline mode are huggingface_hub's own settings (HF_ENDPOINT, HF_TOKEN, HF_HOME,
HF_HUB_OFFLINE).
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from shardit.errors import InputError
from shardit.loading.index import ADAPTER_CONFIG, INDEX, components
from shardit.loading.safetensors_file import Header, TensorEntry
from shardit.loading.weight_names import choose, is_weights

_SETTINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".yaml")


@dataclass
class HubRemote:
    """One commit of a hub repository and the snapshot folder with its downloaded files."""

    model: str
    folder: Path
    _listing: list[str] | None = field(default=None, repr=False)
    variant: str | None = None

    @property
    def commit(self) -> str:
        return self.folder.name

    def listing(self) -> list[str]:
        """List every file of the commit; if the hub is unreachable, list the cached files."""
        if self._listing is None:
            from huggingface_hub import HfApi

            try:
                with _explained(self.model):
                    self._listing = HfApi().list_repo_files(self.model, revision=self.commit)
            except Unreachable:
                self._listing = _held(self.folder)
        return self._listing

    def names(self, folder: str) -> list[str]:
        """Return the plain names of the files in a component folder."""
        return [PurePosixPath(file).name for file in self.listing() if str(PurePosixPath(file).parent) == folder]

    def fetch(self, files: list[str]) -> None:
        """Download the named files into the snapshot folder; skip files that are already there."""
        absent = [file for file in files if not (self.folder / file).exists()]
        if not absent:
            return
        from huggingface_hub import snapshot_download

        with _explained(self.model):
            # The names are exact; escaping keeps brackets in them from being read as patterns.
            patterns = [glob.escape(file) for file in absent]
            snapshot_download(self.model, revision=self.commit, allow_patterns=patterns)
        missing = [file for file in absent if not (self.folder / file).exists()]
        if missing:
            raise InputError(f"{self.model} has no file {missing[0]}: its repository is incomplete, choose another")

    def header(self, file: str) -> Header:
        """Read the header of a weight file by an HTTP range request; byte ranges count from the start of the data."""
        from huggingface_hub import HfApi

        with _explained(self.model):
            found = HfApi().parse_safetensors_file_metadata(self.model, file, revision=self.commit)
        entries = {
            name: TensorEntry(str(info.dtype), tuple(info.shape), info.data_offsets[0], info.data_offsets[1])
            for name, info in found.tensors.items()
        }
        return Header(entries, dict(found.metadata or {}))


@dataclass
class FlatRemote:
    """One commit of a hub repository with a single model, whose files are in its root folder."""

    hub: HubRemote

    @property
    def folder(self) -> Path:
        """The snapshot folder."""
        return self.hub.folder

    def names(self, folder: str) -> list[str]:
        """Return the plain names of the files in the root folder; `folder` is ignored."""
        return self.hub.names(".")

    def header(self, file: str) -> Header:
        """Return the header of a weight file ("folder/name")."""
        return self.hub.header(PurePosixPath(file).name)

    def fetch(self, files: list[str]) -> None:
        """Download the named files ("folder/name")."""
        self.hub.fetch([PurePosixPath(file).name for file in files])


def open_hub(model: str, variant: str | None = None) -> HubRemote:
    """Open the newest commit of a model on the hub and download every file that a pipeline needs except weights.
    Weights of the variant are preferred if there are any.

    Raises InputError if the model is unknown, gated or not a diffusers pipeline, or if the hub is unreachable.
    """
    remote = _newest(model, INDEX, variant)
    remote.fetch(_settings(remote))
    return remote


def open_flat(model: str, index: str) -> FlatRemote:
    """Open the newest commit of a hub repository with a single model described by the file `index`, and download every
    file that it needs except weights. Raises InputError, as `open_hub` does."""
    remote = FlatRemote(_newest(model, index))
    names = remote.names("")
    own = _chosen_index(names, model)
    remote.fetch(
        [name for name in names if name.endswith(_SETTINGS) and ("index" not in name.split(".") or name == own)]
    )
    return remote


def flat_on_hub(model: str, index: str) -> bool:
    """Return whether a repository contains a single model described by the file `index`, rather than a pipeline; from
    the cache if the hub is unreachable. False for a repository that does not exist."""
    from huggingface_hub import HfApi

    try:
        with _explained(model):
            files = {file.rfilename for file in HfApi().model_info(model).siblings or []}
    except Unreachable:
        return cached(model) is None and cached(model, index) is not None
    except InputError:
        return False
    return index in files and INDEX not in files


def _newest(model: str, index: str, variant: str | None = None) -> HubRemote:
    """Open the newest commit of a repository, with the file `index`."""
    from huggingface_hub import HfApi, hf_hub_download

    listing: list[str] | None = None
    commit: str | None = None
    try:
        # This call does not retry, so that an unreachable hub is noticed at once.
        with _explained(model, index):
            info = HfApi().model_info(model)
        commit, listing = info.sha, [file.rfilename for file in info.siblings or []]
        with _explained(model, index):
            path = Path(hf_hub_download(model, index))
    except Unreachable:
        path = cached(model, index)
        if path is None:
            raise
        commit, listing = path.parent.name, _held(path.parent)
    return HubRemote(model, path.parent, listing if commit == path.parent.name else None, variant)


def _held(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def cached(model: str, index: str = INDEX) -> Path | None:
    """Return the index of the newest commit in the cache, None if the cache has none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, index)
    return Path(found) if isinstance(found, str) else None


def index_folder(model: str) -> Path | None:
    """Return the folder with the index of a hub model before the model is loaded; fetch the index if the cache has
    none. Returns None if the index is in the cache but the hub may have a newer one.

    Raises InputError if no index can be found.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download

    path = cached(model)
    if path is None:
        with _explained(model):
            HfApi().model_info(model)
            path = Path(hf_hub_download(model, INDEX))
        return path.parent
    return path.parent if constants.HF_HUB_OFFLINE else None


def check_cached(model: str, what: str) -> None:
    """Raise InputError in offline mode if the cache has no file of the repository."""
    from huggingface_hub import constants, file_download

    folder = Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(repo_id=model, repo_type="model")
    if constants.HF_HUB_OFFLINE and not folder.exists():
        raise Unreachable(f"{what} {_NOT_CACHED}")


def _settings(remote: HubRemote) -> list[str]:
    """List the configs, tokenizers and weight indexes of the components in the index."""
    chosen = []
    folders = _component_folders(remote)
    for file in remote.listing():
        path = PurePosixPath(file)
        if path.parts[0] not in folders or len(path.parts) < 2 or not file.endswith(_SETTINGS):
            continue
        if "index" in path.name.split(".") and path.name != _index_name(remote, path.parts[0]):
            continue  # the index of a variant, or of pickles
        chosen.append(file)
    return chosen


def _component_folders(remote: HubRemote) -> set[str]:
    """Return the folders of the components in the index, except those with the value null.

    A component that is a list of models has further folders, NAME_1 and so on, which are not in the index.
    """
    listed = components(remote.folder)
    found = {name for name, part in listed.items() if not part.absent}
    further = {PurePosixPath(file).parts[0] for file in remote.listing()} - listed.keys()
    return found | {folder for folder in further if re.sub(r"_[1-9][0-9]*$", "", folder) in found}


def _index_name(remote: HubRemote, folder: str) -> str | None:
    return _chosen_index(remote.names(folder), folder, remote.variant)


def _chosen_index(names: list[str], where: str, variant: str | None = None) -> str | None:
    """Return the index of the weights that will be loaded, if they have one."""
    if not any(is_weights(name) for name in names):
        return None
    try:
        choice = choose(names, where, variant)
    except InputError:
        return None  # reported when the weights are requested
    return choice.name if choice.sharded else None


def weight_files(remote: HubRemote) -> list[str]:
    """List the weight files ("folder/name") of all components in the index."""
    chosen = []
    for folder in sorted(_component_folders(remote)):
        names = remote.names(folder)
        if not any(is_weights(name) for name in names):
            continue
        choice = choose(names, f"{remote.model}/{folder}", remote.variant)
        shards = [choice.name]
        if choice.sharded:
            table: dict[str, Any] = json.loads((remote.folder / folder / choice.name).read_text())
            shards = sorted(set(table["weight_map"].values()))
        chosen += [f"{folder}/{name}" for name in shards]
    return chosen


LOCAL = "a folder or tiny/NAME"
"""Models that need no hub."""

_NOT_CACHED = "is not (wholly) in the cache and HF_HUB_OFFLINE is set: unset it or download it first"


class Unreachable(InputError):
    """The hub is unreachable or must not be contacted."""


def unreachable(error: BaseException, what: str, instead: str = LOCAL) -> Unreachable | None:
    """Convert an error of huggingface_hub to Unreachable if it, or one of its causes, means that the hub cannot be
    asked for `what`; return None for other errors. instead: what needs no hub."""
    from huggingface_hub import constants, errors

    known = (errors.LocalEntryNotFoundError, *_network_errors())
    found = next((one for one in _chain(error) if isinstance(one, known)), None)
    if found is None:
        return None
    if isinstance(found, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return Unreachable(f"{what} {_NOT_CACHED}, or give {instead}")
    return Unreachable(f"cannot reach {constants.ENDPOINT} for {what}: check the network, or give {instead}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _explained(model: str, index: str = INDEX) -> Iterator[None]:
    """Convert errors of huggingface_hub to one line with the remedy. index: the file that describes the model."""
    from huggingface_hub import constants, errors

    at = constants.ENDPOINT
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(f"{model} is gated: accept its terms at {at}/{model}, then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is no model {model!r} here or at {at}: check the name (or set HF_TOKEN if it is private)"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # EntryNotFoundError as well
        raise unreachable(error, model) or error from error
    except errors.EntryNotFoundError as error:
        kinds = {INDEX: "a diffusers pipeline", ADAPTER_CONFIG: "an adapter of peft"}
        kind = kinds.get(index, "a model of transformers")
        raise InputError(f"{model} is not {kind} (no {index}): choose a repository that has one") from error
    except errors.HFValidationError as error:
        raise InputError(f"{model!r} is neither a folder nor a hub id (owner/name): check the path") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        if isinstance(status, int) and status >= 500:
            raise Unreachable(f"{at} answered {status} for {model}: try again later") from error
        raise InputError(f"{at} answered {status} for {model}: check the name and HF_TOKEN") from error
    except _network_errors() as error:  # includes the error of offline mode
        raise unreachable(error, model) or error from error


def _network_errors() -> tuple[type[BaseException], ...]:
    """Return the exception classes of huggingface_hub's HTTP client, which differs between its versions."""
    found: list[type[BaseException]] = [ConnectionError, TimeoutError]
    for name, attribute in (
        ("httpx2", "TransportError"),
        ("httpx", "TransportError"),
        ("requests", "RequestException"),
    ):
        try:
            found.append(getattr(__import__(name), attribute))
        except (ImportError, AttributeError):
            continue
    return tuple(found)
