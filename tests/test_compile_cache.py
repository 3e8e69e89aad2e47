"""Programs that were compiled once are loaded from then on, and only where they are the same."""

import os
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import compile_cache
from jaxserve.compile_cache import CompileCache
from jaxserve.errors import ConfigError

SHAPE = jax.ShapeDtypeStruct((3,), jnp.float32)


class Function:
    """x + 2 x in place of x; counts how often it is traced, which is how often it is compiled."""

    def __init__(self):
        self.made = 0

    def __call__(self, tree):
        self.made += 1
        return {"x": tree["x"] + 2 * tree["x"]}

    def by(self, cache, what="triple", shape=SHAPE):
        return cache.get(what, self, {"x": shape}, donate=0)


@pytest.fixture
def triple():
    return Function()


def runs(program):
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(program({"x": x})["x"], [0, 3, 6])
    return x.is_deleted()


def test_a_program_is_made_once_for_all_processes(tmp_path, triple):
    assert runs(triple.by(CompileCache(str(tmp_path), whole=True))) and triple.made == 1
    again = triple.by(CompileCache(str(tmp_path), whole=True))
    assert triple.made == 1
    assert runs(again), "what was donated stays so"
    assert again.memory_analysis().alias_size_in_bytes == 12


def test_another_program_is_another(tmp_path, triple, monkeypatch):
    cache = CompileCache(str(tmp_path), whole=True)
    triple.by(cache)
    triple.by(cache, shape=jax.ShapeDtypeStruct((4,), jnp.float32))
    assert triple.made == 2
    with jax.default_matmul_precision("highest"):
        triple.by(cache)
    assert triple.made == 3, "made under other settings"
    monkeypatch.setattr(compile_cache, "_code", lambda: "an edited source")
    triple.by(cache)
    assert triple.made == 4, "made by other code"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    triple.by(cache)
    assert triple.made == 5, "made with other flags"


def test_without_a_directory_nothing_is_kept(triple):
    cache = CompileCache("", whole=True)
    assert runs(triple.by(cache)) and runs(triple.by(cache)) and triple.made == 2


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:100], lambda data: b"nonsense"])
def test_a_damaged_program_is_made_again(tmp_path, triple, damage, caplog):
    cache = CompileCache(str(tmp_path), whole=True)
    triple.by(cache)
    (kept,) = (tmp_path / "programs").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert runs(triple.by(cache)) and triple.made == 2
    assert str(kept) in caplog.text
    assert runs(triple.by(cache)) and triple.made == 2, "and is whole again"


def test_a_directory_that_cannot_be_written_costs_no_start(tmp_path, triple, caplog):
    (tmp_path / "programs").write_text("a file in the way")
    assert runs(triple.by(CompileCache(str(tmp_path), whole=True))) and triple.made == 1
    assert "not kept" in caplog.text
    with pytest.raises(ConfigError, match=f"cannot be kept in {tmp_path / 'programs'}"):
        triple.by(CompileCache(str(tmp_path), whole=True, must_keep=True))


def test_of_a_folder_that_was_filled_on_purpose_nothing_goes(tmp_path, triple):
    """And where it cannot be written it is read all the same."""
    cache = CompileCache(str(tmp_path), whole=True)
    triple.by(cache)
    (tmp_path / compile_cache.MANIFEST).write_text("{}")
    (old,) = (tmp_path / "programs").iterdir()
    os.utime(old, (0, 0))
    triple.by(cache, "other")
    assert old.exists()
    with mock.patch.object(os, "utime", side_effect=OSError(30, "Read-only file system")):
        assert runs(triple.by(cache)) and triple.made == 2


def test_whether_a_program_was_compiled_is_told(tmp_path, triple):
    def find(directory):
        return CompileCache(str(directory), whole=True).find("triple", triple, {"x": SHAPE}, donate=0).compiled

    assert find(tmp_path / "a") and not find(tmp_path / "a") and find(tmp_path / "b")
    assert CompileCache("", whole=True).find("triple", triple, {"x": SHAPE}, donate=0).compiled


def test_programs_that_nobody_loads_go(tmp_path, triple):
    cache = CompileCache(str(tmp_path), whole=True)
    triple.by(cache)
    (old,) = (tmp_path / "programs").iterdir()
    long_ago = time.time() - 86400 * (compile_cache.UNUSED_DAYS + 1)
    os.utime(old, (long_ago, long_ago))
    triple.by(cache)  # loaded: young again
    triple.by(cache, "other")
    assert old.exists()
    os.utime(old, (long_ago, long_ago))
    triple.by(cache, "yet another")
    assert not old.exists() and len(list((tmp_path / "programs").iterdir())) == 2


def test_what_jax_had_in_its_own_cache_is_not_kept_again(tmp_path, triple):
    """XLA:CPU writes a program that it has loaded without its code, and fails only when that is run."""
    jaxs, mine = CompileCache(str(tmp_path / "jax"), whole=False), CompileCache(None, whole=True)
    triple.by(jaxs)  # to disk
    assert mine._directory == tmp_path / "jax" / "programs"
    for _ in range(3):  # from disk, or from what this process has loaded
        assert runs(triple.by(mine))
    assert triple.made == 4 and not mine._directory.exists()
