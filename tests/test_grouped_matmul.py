"""The experts' grouped product for TPU and GPU, without either: its results in interpreters, and where it is taken."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve import quant
from jaxserve.layers import moe
from kernels_pallas.grouped_matmul import gpu, reference, tpu

SIZES = {
    "empty groups, and one of many tiles": ([0, 3, 0, 40, 1, 0], 0, 44),
    "rows of none before and after": ([5, 0, 16, 7], 13, 64),
    "tiles of none, whole groups on their edges": ([16, 32, 0], 32, 128),
    "no rows at all": ([0, 0, 0], 20, 20),
    "one row": ([0, 1], 0, 1),
}


def case(name, outputs=96, inputs=48, dtype=np.float32):
    """x, w, sizes and first, and what comes out. What is nobody's is NaN: rows, and matrices without rows."""
    sizes, first, rows = SIZES[name]
    rng = np.random.default_rng(len(name))
    x = rng.normal(size=(rows, inputs)).astype(dtype)
    w = rng.normal(size=(len(sizes), outputs, inputs)).astype(dtype)
    want = np.zeros((rows, outputs))
    nobodys = np.ones(rows, bool)
    at = first
    for e, size in enumerate(sizes):
        want[at : at + size] = x[at : at + size].astype(np.float64) @ w[e].astype(np.float64).T
        nobodys[at : at + size] = False
        w[e] = w[e] if size else np.nan
        at += size
    x[nobodys] = np.nan
    return (x, w, np.asarray(sizes, np.int32), np.int32(first)), want


def assert_close(got, want, dtype):
    got = np.asarray(got)
    assert got.dtype == dtype and np.isfinite(got.astype(np.float32)).all()
    close = 1e-5 if dtype == np.float32 else 1e-2
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=close, atol=close * np.abs(want).max())


# Blocks of outputs that hang over, computed in turns of 128, and one that has them all.
BODIES = {
    "reference": (reference.grouped_matmul, 96),
    "tpu": (partial(tpu.grouped_matmul, blocks=tpu.Blocks(16, 96), interpret=True), 96, 256),
    "tpu, blocks": (partial(tpu.grouped_matmul, blocks=tpu.Blocks(32, 256), interpret=True), 320),
    "tpu, turns": (partial(tpu.grouped_matmul, blocks=tpu.Blocks(16, 384), interpret=True), 384, 256),
    "tpu, inputs first": (partial(tpu.grouped_matmul, blocks=tpu.Blocks(16, 384), interpret=True), 384),
    "gpu": (partial(gpu.grouped_matmul, blocks=gpu.Blocks(16, 32, 32), interpret=True), 80),
    "xla": (quant.ragged, 96),
}


EDGES = list(SIZES)[1]
EVERY = [(body, name) for body in ("reference", "tpu", "gpu", "xla") for name in SIZES]


@pytest.mark.parametrize(("body", "name"), [*EVERY, *((body, EDGES) for body in BODIES if body not in dict(EVERY))])
def test_each_row_meets_its_own_matrix_and_nothing_of_nobodys(body, name):
    run, *sizes = BODIES[body]
    given, want = case(name, *sizes)
    if body == "xla":  # which multiplies all by all
        given = (*(np.nan_to_num(a) for a in given[:2]), *given[2:])
    assert_close(jax.jit(run)(*given), want, np.float32)


@pytest.mark.parametrize("body", ["reference", "tpu", "gpu", "xla"])
def test_sums_are_rounded_once(body):
    given, want = case("empty groups, and one of many tiles", *BODIES[body][1:], dtype=jnp.bfloat16)
    if body == "xla":
        given = (*(jnp.nan_to_num(a) for a in given[:2]), *given[2:])
    got = np.asarray(jax.jit(BODIES[body][0])(*given))
    assert got.dtype == jnp.bfloat16
    # Half of the last of 8 bits, and what sums of float32 miss.
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2**-8, atol=1e-5)


def test_matrices_are_read_as_they_lie():
    """By compiling for v5e and v6e: which of two axes XLA lays along a TPU's 128 lanes."""
    assert not any(tpu._turned(*shape) for shape in ((1792, 4096), (4096, 1792), (192, 2048), (176, 96), (64, 100)))
    assert all(tpu._turned(*shape) for shape in ((2048, 192), (200, 136), (48, 40), (384, 1000), (100, 64)))
    assert tpu._turned(384, 48) and not tpu._turned(384, 256), "both are tried above"


def test_no_two_cores_touch_one_block(without_races):
    given, want = case(EDGES, 256, 16)
    got = tpu.grouped_matmul(*given, blocks=tpu.Blocks(16, 128), interpret=without_races)
    assert_close(got, want, np.float32)


def test_the_interpreter_finds_a_matrix_that_is_not_there(monkeypatch):
    pieces = tpu.pieces

    def beyond(*arguments):
        group_of, *others = pieces(*arguments)
        return group_of + 40, *others

    given, _ = case(EDGES)
    monkeypatch.setattr(tpu, "pieces", beyond)
    pltpu.reset_tpu_interpret_mode_state()
    with pytest.raises(Exception, match="(?i)out-of-bounds"):
        jax.block_until_ready(tpu.grouped_matmul(*given, blocks=tpu.Blocks(16, 96), interpret=pltpu.InterpretParams()))
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("rows", [1, 8, 128, 4096, 16384])
@pytest.mark.parametrize("groups", [8, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(14336, 4096), (4096, 14336), (1792, 4096), (96, 2048), (2048, 96)])
def test_blocks_by_rule_fit_the_smallest_chip(rows, groups, outputs, inputs):
    found = tpu.Blocks.by_rule(rows, inputs, groups, outputs, 2)
    assert found.rows % tpu.LEAST_ROWS == 0 and found.rows < rows + tpu.LEAST_ROWS
    assert found.outputs == outputs or found.outputs % tpu.LANES == 0
    assert found.vmem(inputs, 2) <= tpu.USUAL_VMEM
    other = gpu.Blocks.by_rule(rows, groups, 2)
    assert all(n >= 16 and n & (n - 1) == 0 for n in other)
    assert 4 * 2 * (other.rows + other.outputs) * other.inputs <= 160 * 2**10, "shared memory of Ampere"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=np.ones((4, 5), np.float32)), r"x must be \[R, I\] and w \[E, O, I\]; found \[4, 5\] and \[2, 3, 8\]"),
        (dict(x=np.ones((0, 8), np.float32)), r"nothing to multiply: x is \[0, 8\]"),
        (dict(x=np.ones((4, 8), np.float16)), "floats of one type; found float16 and float32"),
        (dict(sizes=np.ones(3, np.int32)), r"sizes must be whole numbers \[2\]; found int32 \[3\]"),
        (dict(sizes=np.ones(2, np.float32)), r"sizes must be whole numbers \[2\]; found float32"),
        (dict(first=np.zeros(1, np.int32)), r"first must be one whole number; found int32 \[1\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = dict(x=np.ones((4, 8), np.float32), w=np.ones((2, 3, 8), np.float32), sizes=np.array([1, 3], np.int32))
    for body in (reference, tpu, gpu):
        with pytest.raises(ValueError, match=message):
            body.grouped_matmul(**given | change)


def kernels(platform, dtype):
    """How many kernels are in a layer of experts that is traced for a platform, and how many other products."""
    p = {"router": (4, 32), "gate": (4, 16, 32), "up": (4, 16, 32), "down": (4, 32, 16)}
    p = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in p.items()}
    device = AbstractDevice("a chip", 1, platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = str(jax.make_jaxpr(partial(moe, used=2))(p, jax.ShapeDtypeStruct((8, 32), dtype)))
    return text.count("name=jaxserve_grouped_matmul"), text.count("ragged_dot_general[")


def test_each_platform_takes_its_own():
    for dtype in (jnp.bfloat16, jnp.float32):
        assert kernels("tpu", dtype)[0] == kernels("gpu", dtype)[0] > 0
        assert kernels("tpu", dtype)[1] == kernels("gpu", dtype)[1] == 0
    assert kernels("tpu", jnp.float16)[0] == 0 < kernels("tpu", jnp.float16)[1], "which the TPU's does not multiply"
    assert kernels("cpu", jnp.float32)[0] == 0
