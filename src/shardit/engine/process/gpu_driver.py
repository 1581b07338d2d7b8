"""Whether this machine has the driver of a GPU; imports no torch."""

from __future__ import annotations

import ctypes
import os
import sys


def has_gpu_driver() -> bool:
    """Return False if torch can have no cuda device: Linux without CUDA's driver library, which torch opens by the
    same name, and without the device file of AMD's driver."""
    if sys.platform != "linux" or os.path.exists("/dev/kfd"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
