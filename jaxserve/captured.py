"""Captured values on their way out of an engine: the bytes of a tap as an array. No jax."""

import math
from collections.abc import Iterable

import numpy as np

from jaxserve.request import TapInfo

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int16", "uint16", "int8", "uint8", "bool")
"""Types that a captured value may have."""


def token_bytes(taps: Iterable[TapInfo]) -> int:
    """Bytes that the values of these taps have a token."""
    return sum(math.prod(tap.shape) * _stored(tap).itemsize for tap in taps)


def dtype_of(tap: TapInfo) -> np.dtype:
    """The type of `values`: the tap's own, but float32 for bfloat16, which neither numpy nor Arrow has."""
    return np.dtype(np.float32) if tap.dtype == "bfloat16" else np.dtype(tap.dtype)


def values(tap: TapInfo, data: bytes | bytearray) -> np.ndarray:
    """What a Delta carries of a tap, [N, *tap.shape] for N tokens."""
    array = np.frombuffer(data, _stored(tap)).reshape(-1, *tap.shape)
    if tap.dtype == "bfloat16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _stored(tap: TapInfo) -> np.dtype:
    return np.dtype(np.uint16 if tap.dtype == "bfloat16" else tap.dtype)
