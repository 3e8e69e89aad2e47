"""Memory for packed weights on the host: small arrays are parts of large ones, which the system backs by huge pages."""

import threading
import weakref

import numpy as np

_SHARED = 64 << 20
"""Bytes of an array that others are parts of."""
_LINE = 64
"""Where every array begins: at a cache line, which is also what lets XLA take it without a copy."""


class _Shared:
    """Hands out one array after the other of `_SHARED` bytes in parts; who has a part keeps the whole."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._whole: weakref.ref[np.ndarray] | None = None
        self._used = 0

    def part(self, nbytes: int) -> np.ndarray:
        with self._lock:
            whole = self._whole() if self._whole is not None else None
            if whole is None or self._used + nbytes > whole.nbytes:
                whole = np.empty(_SHARED, np.uint8)
                self._whole, self._used = weakref.ref(whole), -whole.ctypes.data % _LINE
            start, self._used = self._used, self._used + nbytes + -nbytes % _LINE
            return whole[start : start + nbytes]


_shared = _Shared()


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins at a cache line. Threads may ask at once.

    A step reads all weights, and of 400 MB in pages of 4 KiB the processor looks up a hundred thousand. numpy asks for
    huge pages in arrays of 4 MiB and more only, so smaller ones share such arrays.
    """
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if nbytes > _SHARED // 8:
        memory = np.empty(nbytes + _LINE, np.uint8)
        start = -memory.ctypes.data % _LINE
        memory = memory[start : start + nbytes]
    else:
        memory = _shared.part(nbytes)
    return memory.view(dtype).reshape(shape)
