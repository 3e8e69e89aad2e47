"""The experts' product with quantised matrices, for TPU and GPU without either, in interpreters; what is refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quantised_matmul import CODES

from kernels_pallas.grouped_matmul import gpu, reference, tpu
from kernels_pallas.grouped_matmul.contract import Quantised, validate_for_gpu

GROUPS = {
    "empty groups, and one of many tiles": ([0, 3, 0, 40, 1, 0], 0, 44),
    "rows of none before and after": ([5, 0, 16, 7], 13, 64),
    "tiles of none, whole groups on their edges": ([16, 32, 0], 32, 128),
    "no rows at all": ([0, 0, 0], 20, 20),
    "one row": ([0, 1], 0, 1),
}
"""Sizes, first and rows."""
MATRICES = {
    "int8": (96, 288, 32, False),
    "int4": (80, 640, 32, False),
    "uint4 with minima": (320, 592, 16, True),
    "int8, two groups": (384, 64, 32, True),
}
"""Outputs, inputs, group, and whether there are minima."""
BODIES = {
    "reference": reference.grouped_matmul,
    "tpu": partial(tpu.grouped_matmul, interpret=True),
    "tpu, blocks": partial(tpu.grouped_matmul, blocks=tpu.Blocks(16, 128), interpret=True),
    "gpu": partial(gpu.grouped_matmul, interpret=True),
    "gpu, blocks": partial(gpu.grouped_matmul, blocks=gpu.Blocks(16, 32, 32), interpret=True),
}


def case(groups, kind, dtype=np.float32):
    """x, w, sizes and first, and what comes out in float64 of weights that are rounded to x's type. What is nobody's is
    NaN: rows, and scales of matrices without rows."""
    (sizes, first, rows), (outputs, inputs, group, minima) = GROUPS[groups], MATRICES[kind]
    kind = kind.split(",")[0].split()[0]
    rng = np.random.default_rng(rows + inputs)
    x = rng.normal(size=(rows, inputs)).astype(dtype)
    codes = rng.integers(*CODES[kind], (len(sizes), inputs, outputs)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, (len(sizes), inputs // group, outputs)).astype(np.float32)
    lowest = rng.normal(size=scales.shape).astype(np.float32) if minima else None
    want, nobodys, at = np.zeros((rows, outputs)), np.ones(rows, bool), first
    for e, size in enumerate(sizes):
        w = codes[e].astype(np.float32).reshape(-1, group, outputs) * scales[e][:, None]
        w = w if lowest is None else w - lowest[e][:, None]
        w = w.reshape(inputs, outputs).astype(dtype).astype(np.float64)
        want[at : at + size] = x[at : at + size].astype(np.float64) @ w
        nobodys[at : at + size] = False
        scales[e] = scales[e] if size else np.nan
        at += size
    x[nobodys] = np.nan
    beyond = [(0, 0), (0, -scales.shape[1] % 8), (0, 0)]  # of the scales, nobody's
    scales, lowest = (None if a is None else np.pad(a, beyond, constant_values=np.nan) for a in (scales, lowest))
    stored = Quantised(jnp.asarray(codes).astype(kind), jnp.asarray(scales), lowest, group)
    return (x, stored, np.asarray(sizes, np.int32), np.int32(first)), want


EDGES = list(GROUPS)[1]
RUNS = [(body, name, "uint4 with minima") for body in ("reference", "tpu", "gpu") for name in GROUPS]
RUNS += [(body, EDGES, kind) for body in BODIES for kind in MATRICES if (body, EDGES, kind) not in RUNS]


@pytest.mark.parametrize(("body", "groups", "kind"), RUNS)
def test_each_row_meets_its_own_matrix_and_nothing_of_nobodys(body, groups, kind):
    given, want = case(groups, kind)
    got = np.asarray(jax.jit(BODIES[body])(*given))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("body", ["reference", "tpu", "gpu"])
def test_weights_and_sums_are_rounded_once(body):
    given, want = case("empty groups, and one of many tiles", "int4", dtype=jnp.bfloat16)
    got = np.asarray(jax.jit(BODIES[body])(*given))
    assert got.dtype == jnp.bfloat16
    # Half of the last of 8 bits, and what sums of float32 miss.
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2**-8, atol=1e-5 * np.abs(want).max())


def test_no_two_cores_touch_one_block(without_races):
    given, want = case(EDGES, "int8, two groups")
    got = np.asarray(tpu.grouped_matmul(*given, blocks=tpu.Blocks(16, 128), interpret=without_races))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("rows", [1, 128, 16384])
@pytest.mark.parametrize(("outputs", "inputs"), [(14336, 4096), (4096, 14336), (768, 2048), (2048, 768), (2048, 96)])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 32), (8, 16), (8, 32)])
def test_blocks_by_rule_fit_the_smallest_chip(rows, outputs, inputs, bits, group):
    found = tpu.Blocks.by_rule(rows, inputs, 128, outputs, 2, quantised=True)
    assert min(rows, 32) <= found.rows <= max(rows, 16) and found.rows % tpu.LEAST_ROWS == 0
    codes, scales = found.outputs * inputs * bits // 8, 4 * found.outputs * -(-inputs // group // 8) * 8
    assert found.vmem(inputs, 2, codes + 2 * scales) <= tpu.USUAL_VMEM


GOOD = Quantised(np.ones((2, 64, 3), np.int8), np.ones((2, 2, 3), np.float32), None, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(codes=np.ones((2, 32, 3), np.int8)), r"x must be \[R, I\] and w \[E, O, I\]; found .* \[2, 3, 32\]"),
        (dict(codes=np.ones((2, 64, 3), np.int32)), "codes must be int8, int4 or uint4; found int32"),
        (dict(scales=np.ones((1, 2, 3), np.float32)), "codes, scales and minima must be of 2 matrices each"),
        (dict(scales=np.ones((2, 1, 3), np.float32)), "64 inputs have 1 scales an output, not one for 32"),
        (dict(group=24), "64 inputs are no whole groups of 24"),
        (dict(minima=np.ones((2, 2, 4), np.float32)), "minima must be like scales"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, sizes = np.ones((4, 64), np.float32), np.array([1, 3], np.int32)
    for body in (reference, tpu, gpu):
        with pytest.raises(ValueError, match=message):
            body.grouped_matmul(x, replace(GOOD, **change), sizes)


def test_what_a_gpu_does_not_multiply_is_refused():
    odd = replace(GOOD, codes=jnp.ones((2, 64, 3), jnp.int4))
    with pytest.raises(ValueError, match="4 bits lie in pairs; found 64 inputs and 3 outputs"):
        validate_for_gpu(np.dtype(np.float32), "8.0", odd)
    validate_for_gpu(np.dtype(np.float32), "8.0", GOOD)
