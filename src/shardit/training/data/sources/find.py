"""The items that the setting `data` names."""

from __future__ import annotations

from shardit.errors import InputError
from shardit.settings.paths import user_path
from shardit.training.data.items import FoundItems
from shardit.training.data.sources.drawn import drawn_items
from shardit.training.data.sources.folder import ROWS, folder_items
from shardit.training.data.sources.hub import hub_items
from shardit.training.data.sources.rows import row_items

_WAYS = "a folder, a .jsonl file, hf:NAME, shapes:moving, shapes:centred, shapes:diagonal or shapes:still"


def find_items(source: str, *, held_out: bool = False) -> FoundItems:
    """Return the items of some data. Opens no image and no clip. Raises InputError.

    held_out: for data of validation; drawn shapes then have captions that training does not meet.
    """
    kind, colon, name = source.partition(":")
    if colon and kind == "shapes":
        return drawn_items(name, held_out)
    if colon and kind == "hf":
        return hub_items(name)
    if not source:
        raise InputError(f"data is missing; give {_WAYS}")
    setting = "validation_data" if held_out else "data"
    path = user_path(setting, source)
    if path.is_dir():
        return folder_items(path)
    if path.is_file() and path.suffix.lower() == ROWS:
        return row_items(path)
    wrong = "is a file of another kind" if path.exists() else "does not exist"
    raise InputError(f"{setting} {source} {wrong}; give {_WAYS}")
