"""What the compiled steps look like: the cache in place in every shape, few shapes, nothing that grows with it."""

from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.batch import Shape
from jaxserve.config import DeviceOptions, EngineOptions, ScheduleOptions
from jaxserve.metrics import EngineMetrics
from jaxserve.runner import Runner


@pytest.fixture(scope="module")
def runner():
    options = EngineOptions(
        schedule=ScheduleOptions(max_num_seqs=4, max_num_batched_tokens=16),
        device=DeviceOptions(block_size=4, num_kv_pages=64, warmup="lazy"),
    )
    path = Path(__file__).parent / "goldens" / "llama2"
    return Runner(options, path, EngineMetrics("test"), lambda message: None)


@pytest.mark.parametrize("shape", [Shape(1, 1), Shape(2, 2), Shape(16, 4)], ids=str)
def test_the_cache_is_changed_in_place(runner, shape):
    def sizes(pages):
        compiled = runner._compile(shape, replace(runner.sizes, num_pages=pages))
        memory = compiled.memory_analysis()
        cache = 2 * pages * 4 * 4 * 2 * 12 * 4  # layers, pages, page, heads, k and v, head_dim, bytes
        return cache, memory.alias_size_in_bytes, memory.temp_size_in_bytes

    cache, alias, temp = sizes(64)
    big_cache, big_alias, big_temp = sizes(6400)
    assert alias >= cache and big_alias >= big_cache, "the donated cache is the result"
    assert big_temp - temp < (big_cache - cache) / 10, "a copy of the cache"


@pytest.mark.parametrize("shape", [Shape(1, 1), Shape(2, 2)], ids=str)
def test_so_is_the_history(runner, shape):
    def temp(length):
        compiled = runner._compile(shape, replace(runner.sizes, max_num_seqs=64, max_model_len=length))
        return compiled.memory_analysis().temp_size_in_bytes

    history = 64 * (100_000 - 256) * 4
    assert temp(100_000) - temp(256) < history / 10


def test_sizes_are_worked_out_and_said(runner):
    info = runner.info
    assert info.num_pages == 64 and info.max_model_len == 256 and info.max_num_seqs == 4
    assert info.device_bytes["kv"] == 64 * 4 * 2 * 96 * 4
    assert info.device_bytes["weights"] == info.num_params * 4 and info.device_bytes["workspace"] > 0
