"""The GPU's kernels without a GPU: their shapes and types under interpreters, what is cut and chosen for them."""

import logging
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted_runs import runs_of
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_kernels import oracle, random_batch

from jaxserve import attention
from jaxserve.errors import ConfigError
from kernels_pallas.ragged_paged_attention import gpu, gpu_hopper, gpu_triton, tuning
from kernels_pallas.ragged_paged_attention.contract import Int8Cache, quantised, validate_for_gpu
from kernels_pallas.ragged_paged_attention.tuning.gpu import (
    OWN_BYTES,
    ROWS,
    SCALE_BYTES,
    SHARED_BYTES,
    GpuBlocks,
    blocks_for,
)

SMALL = gpu.Chip("a GPU of one core", "9.0", 1)
FP8 = "float8_e4m3fn"

# Rows that are tiles of 128 and of 32 bytes, more heads than a chunk takes, pages of less than a block and of more,
# parts of sequences; the first in float32, which the interpreter multiplies as it is.
HOPPER = [
    dict(heads=2, kv_heads=2, head_dim=64, page=16, dtype="float32", waves=12, sinks=True),
    dict(heads=12, kv_heads=1, head_dim=80, page=128, dtype="bfloat16", window=20, soft_cap=3.0),
    dict(heads=4, kv_heads=2, head_dim=32, page=32, dtype="float32", kept="int8", soft_cap=3.0),
    dict(heads=2, kv_heads=1, head_dim=96, page=128, dtype="bfloat16", kept=FP8, window=20),
]
TRITON = [
    dict(heads=16, kv_heads=1, head_dim=80, page=32, dtype="bfloat16", waves=16, window=33),
    dict(heads=3, kv_heads=1, head_dim=192, page=128, dtype="float16", sinks=True, causal=False),
    dict(heads=18, kv_heads=2, head_dim=24, page=32, dtype="bfloat16", kept="int8", waves=16, window=33),
    dict(heads=2, kv_heads=1, head_dim=48, page=128, dtype="float16", kept=FP8, causal=False),
]


def as_kept(rows, kept, kv_heads):
    """Rows [P, page, K*2*H] as a cache of that type; what is NaN has NaN for a scale in an Int8Cache."""
    if kept != jnp.int8:
        return rows.astype(kept)
    values, scales = quantised(rows.reshape(*rows.shape[:2], kv_heads * 2, -1))
    return Int8Cache(values.reshape(rows.shape), scales.transpose(0, 2, 1))


def numbers_in(cache):
    """What a cache keeps, float64 [P, page, K*2*H]."""
    if not isinstance(cache, Int8Cache):
        return np.asarray(cache, np.float64)
    scales = np.asarray(cache.scales, np.float64).transpose(0, 2, 1)[..., None]  # [P, page, K*2, 1]
    values = np.asarray(cache.values, np.float64).reshape(*scales.shape[:3], -1)
    return (values * scales).reshape(cache.shape)


# Rows of queries that a share has not are NaN in the interpreter's memory.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize(
    ("body", "case"),
    [*(("hopper", case) for case in HOPPER), *(("triton", case) for case in TRITON)],
    ids=lambda v: (
        v if isinstance(v, str) else f"{v['heads']}-{v['kv_heads']}x{v['head_dim']}-{v['dtype']}-{v.get('kept')}"
    ),
)
def test_shapes_and_types(body, case):
    """Against float64, from the keys and values as the cache keeps them; what is not written is NaN."""
    sizes = {name: case[name] for name in ("heads", "kv_heads", "head_dim", "page")}
    options = {name: case[name] for name in ("window", "soft_cap", "causal") if name in case}
    args, kv = random_batch(
        np.random.default_rng(2),
        **sizes,
        pages=50,
        tokens=36,
        seqs_total=5,
        q_lens=[1, 1, 5, 19],
        pasts=[0, 100, 50, 9],
    )
    table, dtype = args[5][:, : -(-128 // case["page"])], jnp.dtype(case["dtype"])
    # As one program, not one an operation; and NumPy, which needs none, makes the numbers narrower.
    keep = jax.jit(partial(as_kept, kept=jnp.dtype(case.get("kept", dtype)), kv_heads=case["kv_heads"]))
    *new, rows = [np.asarray(a).astype(dtype) for a in args[:4]]
    new = [jnp.asarray(a) for a in new]
    args = [*new, keep(rows), args[4], table, *args[6:]]
    if case.get("sinks"):
        options["sinks"] = np.linspace(-2, 3, case["heads"]).astype(np.float32)
    blocks = GpuBlocks(64, 2, 1, case.get("waves", 0))
    run = jax.jit(
        partial(
            gpu.ragged_paged_attention, scale=0.2, chip=SMALL, decode=blocks, prefill=blocks, **options,
            interpret=plgpu.InterpretGPUParams() if body == "hopper" else True,
        )
    )  # fmt: skip
    out, cache = run(*args)
    kv = [numbers_in(keep(rows.astype(dtype).reshape(1, len(rows), -1))).reshape(rows.shape) for rows in kv]
    seen = [np.asarray(args[0], np.float64), *args[1:3], 0, *args[4:]]
    want = oracle(seen, kv, 0.2, options.pop("window", None), **options)
    close = 2e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float64)[: len(want)], want, rtol=close, atol=close)
    assert np.isfinite(np.asarray(out, np.float32)).all(), "padding rows must stay finite"
    held = numbers_in(cache)
    for s, rows in enumerate(kv):
        got = held[np.asarray(table)[s]].reshape(-1, *rows.shape[1:])[: len(rows)]
        np.testing.assert_array_equal(got, rows)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_number_of_eight_bits_is_made_wider_exactly(dtype):
    """In Triton, by moving bits."""
    every = np.arange(256, dtype=np.uint8)
    for kept in (FP8, "int8"):
        numbers = every.view(jnp.dtype(kept))
        got = gpu_triton.widened(jnp.asarray(numbers), jnp.dtype(dtype))
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), numbers.astype(np.float32))


@pytest.mark.parametrize(
    ("found", "hopper"),
    [
        ({}, True),
        (dict(capability="8.0"), False), (dict(capability="10.0"), False),
        (dict(dtype="float32", kept="float32"), False), (dict(head_dim=80), True), (dict(head_dim=24), False),
        (dict(kept="int8"), True), (dict(kept=FP8), True), (dict(dtype="float16", kept="int8"), True),
        (dict(dtype="float32", kept="int8"), False), (dict(kept=FP8, head_dim=80), False),
        (dict(kept="int8", page=16), False), (dict(kept="int8", page=32), True), (dict(kept=FP8, page=16), True),
    ],
    ids=str,
)  # fmt: skip
def test_the_body_for_hopper_takes_what_its_copies_and_products_can(found, hopper):
    asked = dict(capability="9.0", dtype="bfloat16", kept="bfloat16", head_dim=128, page=64) | found
    asked |= {name: jnp.dtype(asked[name]) for name in ("dtype", "kept")}
    assert gpu_hopper.takes(**asked) == hopper


@pytest.fixture(scope="module")
def interpreted():
    return runs_of("gpu_interpreted.py")


@pytest.mark.parametrize("name", ["mixed, with a window, decoding in parts", "int8"])
def test_every_copy_is_waited_for_and_no_two_touch_one_buffer(interpreted, name):
    run = interpreted[name]
    assert run["raised"] is None and run["error"] < 2e-5, run
    assert not run["race"]


def test_the_interpreter_finds_planted_bugs(interpreted):
    """Of a page outside of the cache it makes zeros, as the copy engine does: only the result tells. So it is on the
    oldest JAX for a buffer that is filled too early, which newer ones call a race."""
    assert interpreted["no wait"]["race"] and interpreted["int8, no wait"]["race"]
    early = interpreted["buffer filled while read"]
    assert early["race"] or early["raised"] or not early["error"] < 0.1
    assert interpreted["page of nobody"]["error"] > 0.1


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", 2), (FP8, 1), ("int8", 1)])
def test_blocks_by_rule_fit_shared_memory(dtype, kept):
    for head_dim in (64, 80, 96, 128, 192, 256):
        for blocks, result in zip(
            blocks_for("a chip of tomorrow", True, dtype, "bfloat16", 32, 8, head_dim, 64), (4, 0), strict=True
        ):
            shared = ROWS * head_dim * (2 + result) + OWN_BYTES
            shared += blocks.buffers * blocks.positions * head_dim * 2 * kept
            if kept == 1:  # and the block that they become numbers in
                shared += blocks.positions * head_dim * 2
            if dtype == "int8":
                shared += blocks.buffers * SCALE_BYTES
                assert 2 * blocks.positions * 4 <= SCALE_BYTES
            assert shared <= SHARED_BYTES[head_dim > 128], head_dim
            assert blocks.buffers >= 2 and blocks.positions % 64 == 0


def test_blocks_in_triton_are_of_the_queries_numbers():
    by_queries = [blocks_for("a chip", False, "int8", queries, 32, 8, 128, 64) for queries in ("bfloat16", "float32")]
    assert by_queries[0][0].positions > by_queries[1][0].positions


def test_an_entry_of_the_tuning_file_goes_before_the_rule(monkeypatch):
    entry = dict(
        chip="NVIDIA H200", head_dim=128, decode=dict(positions=128, buffers=3), prefill=dict(positions=64, buffers=2)
    )
    monkeypatch.setattr(tuning, "_entries", lambda file: [entry] if file == "gpu.json" else [])
    blocks_for.cache_clear()
    found = GpuBlocks(128, 3), GpuBlocks(64, 2)
    assert blocks_for("NVIDIA H200", True, "float16", "float16", 6, 2, 128, 64) == found
    assert blocks_for("NVIDIA H200", True, "float16", "float16", 6, 2, 64, 64) != found
    blocks_for.cache_clear()


def test_the_choice_of_blocks_is_said_once(caplog):
    blocks_for.cache_clear()
    with caplog.at_level(logging.INFO, "jaxserve.attention"):
        for _ in range(2):
            blocks_for("some chip", True, "int8", "bfloat16", 48, 3, 128, 64)
    (record,) = caplog.records
    assert all(said in record.getMessage() for said in ("some chip", "'hopper': True", "'dtype': 'int8'", "by rule"))


@pytest.mark.parametrize(
    ("shares", "cores", "parts"), [(8, 132, 64), (8 * 16, 132, 4), (8 * 64, 132, 1), (64, 132, 8), (8, 1, 1)]
)
def test_few_sequences_are_cut_into_parts_that_fill_the_chip(shares, cores, parts):
    assert GpuBlocks(64, 2).splits(shares, cores) == parts


def test_what_a_gpu_cannot_do_is_refused():
    bfloat16 = jnp.dtype("bfloat16")
    for dtype in ("bfloat16", "int8", FP8):
        validate_for_gpu(64, jnp.dtype(dtype), 256, "8.0")
    with pytest.raises(ValueError, match=r"a cache of float8_e5m2 \(--kv-cache-dtype\)"):
        validate_for_gpu(64, jnp.dtype("float8_e5m2"), 128, "9.0")
    for capability, found in (("7.5", "7.5"), (None, "none"), ("gfx942", "gfx942")):
        with pytest.raises(ValueError, match=rf"capability 8.0 or above; the device has {found}"):
            validate_for_gpu(64, bfloat16, 128, capability)
    with pytest.raises(ValueError, match="heads of up to 256 numbers; the model's have 512"):
        validate_for_gpu(64, bfloat16, 512, "9.0")
    with pytest.raises(ValueError, match=r"pages of 48 tokens; .*--block-size.* power of two"):
        validate_for_gpu(48, bfloat16, 128, "9.0")
    args, _ = random_batch(np.random.default_rng(0), heads=2, kv_heads=1, head_dim=8, q_lens=[1], pasts=[0])
    with pytest.raises(ValueError, match="pages of 4 tokens"):  # for a real GPU
        gpu.ragged_paged_attention(*args, scale=1.0)
    with pytest.raises(ValueError, match="scale must be a number above 0"):
        gpu.ragged_paged_attention(*args, scale=0.0)
    with pytest.raises(ValueError, match="a cache of the queries' type, or of 8 bits; found bfloat16 and float32"):
        gpu.ragged_paged_attention(*args[:3], args[3].astype("bfloat16"), *args[4:], scale=1.0)


def test_the_kernel_is_chosen_on_gpu_only():
    for capability in ("8.0", "9.0", "12.1"):
        for kind in ("bfloat16", "int8", FP8):
            name, reason, kernel = attention.choose("auto", "gpu", capability=capability, head_dim=128, kv_dtype=kind)
            assert (name, reason, kernel) == ("gpu", "auto on gpu", gpu.ragged_paged_attention)
            assert kind == "bfloat16" or attention.reads(name, kind)
    with pytest.raises(ConfigError, match="attention='gpu' does not run on cpu; use auto"):
        attention.choose("gpu", "cpu")


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (dict(capability="7.5"), "capability 8.0 or above; the device has 7.5"),
        (dict(kv_dtype="float8_e5m2"), "does not read a cache of float8_e5m2"),
        (dict(block_size=8), "does not read pages of 8 tokens"),
        (dict(head_dim=288), "heads of up to 256 numbers"),
    ],
)
def test_what_the_kernels_do_not_read_the_reference_does_and_says_so(what, why):
    asked = dict(capability="9.0") | what
    name, reason, _ = attention.choose("auto", "gpu", **asked)
    assert name == "reference" and re.search(f"slower by far than the GPU's own kernels, but .*{why}", reason)
    with pytest.raises(ConfigError, match=f"attention='gpu': .*{why}"):
        attention.choose("gpu", "gpu", **asked)


def test_the_reference_serves_where_jax_has_no_triton(monkeypatch):
    monkeypatch.setitem(attention.KERNELS, "gpu", "kernels_pallas.ragged_paged_attention.gone")
    name, reason, _ = attention.choose("auto", "gpu", capability="9.0")
    assert name == "reference" and "No module named" in reason
