"""What the compiled steps look like: the cache in place in every shape, few shapes, nothing that grows with it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxserve.batch import Shape
from jaxserve.compile_cache import compile_cache_dir
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


def test_the_compile_cache_that_was_asked_for_is_used(tmp_path):
    """The option goes before JAX's own variable, in a process that has compiled before too."""
    script = f"""
import os, jax
from jaxserve.compile_cache import CompileCache
said = []
jax.jit(lambda x: x + 1)(1.0)
before = sorted(os.listdir({str(tmp_path / "jax")!r}))
CompileCache({str(tmp_path / "ours")!r}, whole=False, progress=said.append)
jax.jit(lambda x: x + 2)(1.0)
CompileCache("", whole=False, progress=said.append)
jax.jit(lambda x: x + 3)(1.0)
assert sorted(os.listdir({str(tmp_path / "jax")!r})) == before, "JAX's own is left alone"
assert len(os.listdir({str(tmp_path / "ours")!r})) >= 1
print(said)
"""
    environ = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax")}
    (tmp_path / "jax").mkdir()
    out = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"['compile cache: {tmp_path / 'ours'}', 'compile cache: off']"


def test_jaxs_own_compile_cache_goes_before_our_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert compile_cache_dir(str(tmp_path)) == str(tmp_path) and compile_cache_dir("") == ""
    for told, taken in (
        (str(tmp_path / "jax"), str(tmp_path / "jax")),
        (None, str(tmp_path / "home" / "jaxserve" / "xla")),
    ):
        jax.config.update("jax_compilation_cache_dir", told)
        assert compile_cache_dir(None) == taken


def test_sizes_are_worked_out_and_said(runner):
    info = runner.info
    assert info.num_pages == 64 and info.max_model_len == 256 and info.max_num_seqs == 4
    assert info.device_bytes["kv"] == 64 * 4 * 2 * 96 * 4
    assert info.num_params == 211008 // 4 and info.device_bytes["workspace"] > 0
    assert info.num_params * 4 <= info.device_bytes["weights"] < info.num_params * 4.2  # rows are filled up to 16
