"""The product with quantised matrices for TPU and GPU, without either: its results in interpreters, what it refuses."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.quantised_matmul import contract, gpu, reference, tpu

CODES = {"int8": (-128, 128), "int4": (-8, 8), "uint4": (0, 16)}


def case(rows, inputs, outputs, group, kind, *, inputs_first, minima=False, dtype=np.float32):
    """Arguments, and what comes out in float64 of weights that are rounded to x's type."""
    rng = np.random.default_rng(rows + inputs)
    x = rng.normal(size=(rows, inputs)).astype(dtype)
    codes = rng.integers(*CODES[kind], (inputs, outputs)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, (inputs // group, outputs)).astype(np.float32)
    lowest = rng.normal(size=scales.shape).astype(np.float32) if minima else None
    w = codes.astype(np.float32).reshape(-1, group, outputs) * scales[:, None]
    w = w if lowest is None else w - lowest[:, None]
    w = w.reshape(inputs, outputs).astype(dtype)
    codes = np.ascontiguousarray(codes if inputs_first else codes.T).view(getattr(ml_dtypes, kind, np.int8))
    return (x, codes, scales, lowest), x.astype(np.float64) @ w.astype(np.float64)


# Blocks whose last ones hang over the end of rows, inputs and outputs, and those by rule.
BODIES = {
    "reference": reference.quantised_matmul,
    "tpu": partial(tpu.quantised_matmul, interpret=True),
    "tpu, blocks": partial(tpu.quantised_matmul, blocks=tpu.Blocks(16, 128, 256), interpret=True),
    "tpu, turns": partial(tpu.quantised_matmul, blocks=tpu.Blocks(16, 256, 256), interpret=True),
    "gpu": partial(gpu.quantised_matmul, interpret=True),
    "gpu, shares": partial(gpu.quantised_matmul, blocks=gpu.Blocks(16, 32, 3), interpret=True),
}
SIZES = {
    ("int8", True, False): (5, 384, 200, 32),
    ("int4", True, False): (20, 640, 300, 32),
    ("uint4", True, True): (17, 288, 160, 16),
    ("int8", False, False): (3, 640, 180, 16),
    ("int8", False, True): (9, 384, 96, 128),
    ("int4", False, False): (20, 384, 140, 32),
}
"""By type of codes, inputs first, minima: rows, inputs, outputs, group."""


def fits(body, inputs_first, outputs, group):
    if body == "tpu, blocks":  # are 8 groups at least
        return 8 * group <= 256
    return body != "tpu, turns" or (inputs_first and outputs >= 256)


RUNS = [
    (body, *kind)
    for body in BODIES
    for kind, (_, _, outputs, group) in SIZES.items()
    if fits(body, kind[1], outputs, group)
]


@pytest.mark.parametrize(("body", "kind", "inputs_first", "minima"), RUNS)
def test_weights_are_what_their_blocks_say(body, kind, inputs_first, minima):
    rows, inputs, outputs, group = SIZES[kind, inputs_first, minima]
    given, want = case(rows, inputs, outputs, group, kind, inputs_first=inputs_first, minima=minima)
    got = np.asarray(jax.jit(partial(BODIES[body], inputs_first=inputs_first))(*given))
    assert got.dtype == np.float32 and got.shape == (rows, outputs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("inputs_first", [True, False])
@pytest.mark.parametrize("body", ["reference", "tpu", "gpu"])
def test_weights_and_sums_are_rounded_once(body, inputs_first):
    given, want = case(6, 256, 128, 32, "int8", inputs_first=inputs_first, dtype=jnp.bfloat16)
    run = partial(BODIES[body], inputs_first=inputs_first)
    exact = np.asarray(jax.jit(partial(run, dtype=jnp.float32))(*given))
    assert exact.dtype == np.float32
    np.testing.assert_allclose(exact, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    got = np.asarray(jax.jit(run)(*given))
    assert got.dtype == jnp.bfloat16 and (got == exact.astype(jnp.bfloat16)).all()


@pytest.mark.parametrize(("kind", "inputs_first"), [("int4", True), ("int8", False)])
def test_no_two_cores_touch_one_block(kind, inputs_first, without_races):
    given, want = case(20, 384, 256, 32, kind, inputs_first=inputs_first)
    blocks = tpu.Blocks(16, 128, 256)
    got = np.asarray(tpu.quantised_matmul(*given, inputs_first=inputs_first, blocks=blocks, interpret=without_races))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("rows", [1, 64, 2048])
@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(14336, 4096), (4096, 14336), (4096, 11008), (128256, 4096), (96, 288)]
)
def test_blocks_by_rule_fit_the_smallest_chip(rows, group, outputs, inputs):
    found = tpu.Blocks.by_rule(rows, inputs, outputs, group, 2)
    assert found.rows % tpu.LEAST_ROWS == 0 and found.rows < rows + tpu.LEAST_ROWS
    assert found.outputs == outputs or found.outputs % tpu.LANES == 0
    assert found.inputs == inputs or found.inputs % (8 * group) == found.inputs % tpu.LANES == 0
    turns = -(-inputs // found.inputs)
    assert turns * found.inputs - inputs <= max(8 * group, inputs // 8), "most of what is fetched is of use"
    assert found.vmem(group, 2, 8) <= tpu.USUAL_VMEM
    other = gpu.Blocks.by_rule(rows, inputs, outputs)
    assert all(n >= 1 and n & (n - 1) == 0 for n in other) and other.rows >= 16 and other.outputs >= 32


GOOD = dict(
    x=np.ones((4, 64), np.float32),
    codes=np.ones((64, 8), np.int8),
    scales=np.ones((2, 8), np.float32),
    inputs_first=True,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=np.ones((4, 32), np.float32)), r"x must be \[T, K\] and codes \[K, N\]; found \[4, 32\] and \[64, 8\]"),
        (dict(inputs_first=False), r"codes \[N, K\]; found \[4, 64\] and \[64, 8\]"),
        (dict(x=np.ones((0, 64), np.float32)), r"nothing to multiply: x is \[0, 64\]"),
        (dict(x=np.ones((4, 64), np.int32)), "x must be floats; found int32"),
        (dict(codes=np.ones((64, 8), np.int16)), "codes must be int8, int4 or uint4; found int16"),
        (dict(scales=np.ones((2, 9), np.float32)), r"scales must be float32 \[K / G, 8\]; found float32 \[2, 9\]"),
        (dict(scales=np.ones((2, 8), np.float16)), r"scales must be float32 \[K / G, 8\]; found float16 \[2, 8\]"),
        (dict(scales=np.ones((3, 8), np.float32)), "64 inputs have 3 scales an output: .* power of two from 16 to 256"),
        (dict(scales=np.ones((8, 8), np.float32)), "64 inputs have 8 scales an output"),
        (dict(minima=np.ones((1, 8), np.float32)), r"minima must be like scales, .*\[2, 8\]; found float32 \[1, 8\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    for body in (reference, tpu, gpu):
        with pytest.raises(ValueError, match=message):
            body.quantised_matmul(**GOOD | change)


def test_what_a_chip_does_not_multiply_is_refused():
    half, plain = np.dtype(np.float16), np.dtype(np.float32)
    with pytest.raises(ValueError, match="multiplies bfloat16 or float32, not float16"):
        contract.validate_for_tpu(half, 256, inputs_first=True)
    with pytest.raises(ValueError, match="128 lanes; found 288"):
        contract.validate_for_tpu(plain, 288, inputs_first=False)
    contract.validate_for_tpu(plain, 288, inputs_first=True)
    with pytest.raises(ValueError, match="capability 8.0 or above; the device has 7.5"):
        contract.validate_for_gpu(half, "7.5", np.dtype(np.int8), 64, 64)
    with pytest.raises(ValueError, match="4 bits lie in pairs; found 64 inputs and 63 outputs"):
        contract.validate_for_gpu(half, "8.0", np.dtype(ml_dtypes.int4), 64, 63)
    contract.validate_for_gpu(half, "8.0", np.dtype(np.int8), 64, 63)
