"""Converts numbers of an output to arrays, and maps (depth, normals, materials: numbers by pixel) to images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


def array_of(numbers: Any) -> np.ndarray:
    """Convert a tensor or array to an array; bfloat16, which numpy lacks, to float32. Imports no torch."""
    import numpy as np

    return np.asarray(numbers.float() if str(getattr(numbers, "dtype", "")) == "torch.bfloat16" else numbers)


def named_arrays(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors and arrays in nested dicts and lists, with names such as "images.0.verts"; without those that a
    .safetensors file cannot hold: text, objects, complex numbers, long doubles."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        array = array_of(value)
        if array.dtype.kind in "biuf" and array.dtype.itemsize <= 8:
            yield name, array
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from named_arrays(each, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for position, each in enumerate(value):
            yield from named_arrays(each, f"{name}.{position}")


def by_name(pairs: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return arrays by name. Raises InputError if two have the same."""
    found: dict[str, np.ndarray] = {}
    for name, array in pairs:
        if name in found:
            raise InputError(f"two results are called {name}, which one file cannot hold; save them from Python")
        found[name] = array
    return found


def pixels_of(images: Sequence[Image]) -> Any:
    """Convert images to one array (N, height, width, channels), or to a list if they differ in size or mode."""
    import numpy as np

    arrays = [np.asarray(image) for image in images]
    return np.stack(arrays) if len({(array.shape, array.dtype) for array in arrays}) == 1 else arrays


def images_of_map(numbers: Any) -> list[Image]:
    """Convert maps of shape (N, height, width, channels) or (N, channels, height, width) to images: one channel to
    16-bit grey, three to 8-bit colours; return [] for other shapes.

    Numbers in [0, 1] or [-1, 1] are scaled from that interval to the range of the image, others from their minimum
    and maximum.
    """
    import numpy as np
    from PIL import Image

    if not hasattr(numbers, "shape"):
        return []
    values = array_of(numbers).astype(np.float32)
    if values.ndim != 4 or not values.size:
        return []
    if values.shape[-1] not in (1, 3):
        values = np.moveaxis(values, 1, -1)
    if values.shape[-1] not in (1, 3):
        return []
    least, most = float(np.nanmin(values)), float(np.nanmax(values))
    if least < -1 or most > 1:
        values = (values - least) / ((most - least) or 1.0)
    elif least < 0:
        values = (values + 1) / 2
    values = np.nan_to_num(values)
    if values.shape[-1] == 1:
        return [Image.fromarray((one[..., 0] * 65535 + 0.5).astype(np.uint16)) for one in values]
    return [Image.fromarray((one * 255 + 0.5).astype(np.uint8)) for one in values]
