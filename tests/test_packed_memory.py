"""Memory for packed weights: parts of shared arrays do not meet, begin at cache lines, and are given back."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxserve.native import memory


@pytest.fixture
def small(monkeypatch):
    """Shared arrays of 64 KiB, the first of them new."""
    monkeypatch.setattr(memory, "_SHARED", 64 << 10)
    monkeypatch.setattr(memory, "_shared", memory._Shared())


def test_arrays_begin_at_cache_lines_and_do_not_meet(small):
    shapes = [
        ((1,), np.uint8),
        ((3, 5), np.float32),
        ((8191,), np.uint8),
        ((0,), np.float32),
        ((40_000,), np.uint8),
    ] * 9
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda of: memory.aligned(of[0], np.dtype(of[1])), shapes))
    for i, array in enumerate(arrays):
        assert (array.shape, array.dtype) == shapes[i] and array.flags.writeable
        assert array.size == 0 or array.ctypes.data % 64 == 0
        array.view(np.uint8)[...] = i
    for i, array in enumerate(arrays):
        assert (array.view(np.uint8) == i).all(), i


def test_small_arrays_share_one_and_large_ones_do_not(small):
    shape = (1000,)
    first, second = (memory.aligned(shape, np.dtype(np.uint8)) for _ in range(2))
    assert first.base is second.base and first.base.nbytes == 64 << 10
    large = memory.aligned((20_000,), np.dtype(np.uint8))
    assert large.base is not first.base and large.base.nbytes < 20_100


def test_what_nobody_has_any_more_is_given_back(small):
    array = memory.aligned((1000,), np.dtype(np.uint8))
    whole = weakref.ref(array.base)
    del array
    gc.collect()
    assert whole() is None
    assert memory.aligned((1000,), np.dtype(np.uint8)).base is not None
