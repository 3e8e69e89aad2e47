"""Programs that were compiled once are loaded from then on, and only where they are the same."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import compile_cache
from jaxserve.compile_cache import CompileCache

WHAT = ("double", (3,))


class Maker:
    """Compiles x + 2 x in place of x, and counts how often."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        shape = jax.ShapeDtypeStruct((3,), jnp.float32)
        return jax.jit(lambda tree: {"x": tree["x"] + 2 * tree["x"]}, donate_argnums=0).lower({"x": shape}).compile()


@pytest.fixture
def before():
    """JAX's own cache, as it was."""
    directory = jax.config.jax_compilation_cache_dir
    yield
    CompileCache(directory or "", whole=False)


@pytest.fixture
def make():
    return Maker()


def runs(program):
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(program({"x": x})["x"], [0, 3, 6])
    return x.is_deleted()


def test_a_program_is_made_once_for_all_processes(tmp_path, make, before):
    assert runs(CompileCache(str(tmp_path), whole=True).get(WHAT, make)) and make.made == 1
    again = CompileCache(str(tmp_path), whole=True).get(WHAT, make)
    assert make.made == 1
    assert runs(again), "what was donated stays so"
    assert again.memory_analysis().alias_size_in_bytes == 12


def test_another_program_is_another(tmp_path, make, before, monkeypatch):
    cache = CompileCache(str(tmp_path), whole=True)
    cache.get(WHAT, make)
    cache.get(("double", (4,)), make)
    assert make.made == 2
    with jax.default_matmul_precision("highest"):
        cache.get(WHAT, make)
    assert make.made == 3, "made under other settings"
    monkeypatch.setattr(compile_cache, "_code", lambda: "an edited source")
    cache.get(WHAT, make)
    assert make.made == 4, "made by other code"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    cache.get(WHAT, make)
    assert make.made == 5, "made with other flags"


def test_without_a_directory_nothing_is_kept(make, before):
    cache = CompileCache("", whole=True)
    assert runs(cache.get(WHAT, make)) and runs(cache.get(WHAT, make)) and make.made == 2


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:100], lambda data: b"nonsense"])
def test_a_damaged_program_is_made_again(tmp_path, make, before, damage, caplog):
    cache = CompileCache(str(tmp_path), whole=True)
    cache.get(WHAT, make)
    (kept,) = (tmp_path / "programs").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert runs(cache.get(WHAT, make)) and make.made == 2
    assert str(kept) in caplog.text
    assert runs(cache.get(WHAT, make)) and make.made == 2, "and is whole again"


def test_a_directory_that_cannot_be_written_costs_no_start(tmp_path, make, before, caplog):
    (tmp_path / "programs").write_text("a file in the way")
    assert runs(CompileCache(str(tmp_path), whole=True).get(WHAT, make)) and make.made == 1
    assert "not kept" in caplog.text


def test_programs_that_nobody_loads_go(tmp_path, make, before):
    cache = CompileCache(str(tmp_path), whole=True)
    cache.get(WHAT, make)
    (old,) = (tmp_path / "programs").iterdir()
    long_ago = time.time() - 86400 * (compile_cache.UNUSED_DAYS + 1)
    os.utime(old, (long_ago, long_ago))
    cache.get(WHAT, make)  # loaded: young again
    cache.get(("other",), make)
    assert old.exists()
    os.utime(old, (long_ago, long_ago))
    cache.get(("yet another",), make)
    assert not old.exists() and len(list((tmp_path / "programs").iterdir())) == 2


def test_what_jax_had_in_its_own_cache_is_not_kept_again(tmp_path, make, before):
    """XLA:CPU writes a program that it has loaded without its code, and fails only when that is run."""
    CompileCache(str(tmp_path / "jax"), whole=False)
    make(), make()
    mine = CompileCache(None, whole=True)
    assert mine._directory == tmp_path / "jax" / "programs"
    assert runs(mine.get(WHAT, make)) and make.made == 3
    assert runs(mine.get(WHAT, make)) and make.made == 4
    assert not mine._directory.exists()
