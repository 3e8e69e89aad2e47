"""The GPU's kernels without a GPU: their shapes and types under interpreters, what is cut and chosen for them."""

import json
import logging
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_kernels import oracle, random_batch

from jaxserve import attention
from jaxserve.errors import ConfigError
from kernels_pallas.ragged_paged_attention import gpu, tuning
from kernels_pallas.ragged_paged_attention.contract import Int8Cache, validate_for_gpu
from kernels_pallas.ragged_paged_attention.tuning.gpu import OWN_BYTES, ROWS, SHARED_BYTES, GpuBlocks, blocks_for

ROOT = Path(__file__).parent.parent
SMALL = gpu.Chip("a GPU of one core", "9.0", 1)

# Rows that are tiles of 128 and of 32 bytes, more heads than a chunk takes, pages of less than a block and of more,
# parts of sequences; the first in float32, which the interpreter multiplies as it is.
HOPPER = [
    dict(heads=2, kv_heads=2, head_dim=64, page=16, dtype="float32", waves=12, sinks=True),
    dict(heads=12, kv_heads=1, head_dim=80, page=128, dtype="bfloat16", window=20, soft_cap=3.0),
]
TRITON = [
    dict(heads=16, kv_heads=1, head_dim=80, page=32, dtype="bfloat16", waves=16, window=33),
    dict(heads=3, kv_heads=1, head_dim=192, page=128, dtype="float16", sinks=True, causal=False),
]


# Rows of queries that a share has not are NaN in the interpreter's memory.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize(
    ("body", "case"),
    [*(("hopper", case) for case in HOPPER), *(("triton", case) for case in TRITON)],
    ids=lambda v: v if isinstance(v, str) else f"{v['heads']}-{v['kv_heads']}x{v['head_dim']}-{v['dtype']}",
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
    args = [*(a.astype(dtype) for a in args[:4]), args[4], table, *args[6:]]
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
    kv = [np.asarray(jnp.asarray(rows).astype(dtype), np.float64) for rows in kv]
    want = oracle([np.asarray(args[0], np.float64), *args[1:]], kv, 0.2, options.pop("window", None), **options)
    close = 2e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float64)[: len(want)], want, rtol=close, atol=close)
    assert np.isfinite(np.asarray(out, np.float32)).all(), "padding rows must stay finite"
    for s, rows in enumerate(kv):
        got = np.asarray(cache, np.float64)[np.asarray(table)[s]].reshape(-1, *rows.shape[1:])[: len(rows)]
        np.testing.assert_array_equal(got, rows)


@pytest.fixture(scope="module")
def interpreted():
    """What each run of tests/gpu_interpreted.py found, by name."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/gpu_interpreted.py")],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {run["name"]: run for run in runs}


def test_every_copy_is_waited_for_and_no_two_touch_one_buffer(interpreted):
    run = interpreted["mixed, with a window, decoding in parts"]
    assert run["raised"] is None and run["error"] < 2e-5, run
    assert not run["race"]


def test_the_interpreter_finds_planted_bugs(interpreted):
    """Of a page outside of the cache it makes zeros, as the copy engine does: only the result tells. So it is on the
    oldest JAX for a buffer that is filled too early, which newer ones call a race."""
    assert interpreted["no wait"]["race"]
    early = interpreted["buffer filled while read"]
    assert early["race"] or early["raised"] or not early["error"] < 0.1
    assert interpreted["page of nobody"]["error"] > 0.1


def test_blocks_by_rule_fit_shared_memory():
    for head_dim in (64, 80, 96, 128, 192, 256):
        for blocks, result in zip(
            blocks_for("a chip of tomorrow", True, "bfloat16", 32, 8, head_dim, 64), (4, 0), strict=True
        ):
            queries = ROWS * head_dim * (2 + result)
            shared = queries + blocks.buffers * blocks.positions * head_dim * 4 + OWN_BYTES
            assert shared <= SHARED_BYTES[head_dim > 128], head_dim
            assert blocks.buffers >= 2 and blocks.positions % 64 == 0


def test_an_entry_of_the_tuning_file_goes_before_the_rule(monkeypatch):
    entry = dict(
        chip="NVIDIA H200", head_dim=128, decode=dict(positions=128, buffers=3), prefill=dict(positions=64, buffers=2)
    )
    monkeypatch.setattr(tuning, "_entries", lambda file: [entry] if file == "gpu.json" else [])
    blocks_for.cache_clear()
    assert blocks_for("NVIDIA H200", True, "float16", 6, 2, 128, 64) == (GpuBlocks(128, 3), GpuBlocks(64, 2))
    assert blocks_for("NVIDIA H200", True, "float16", 6, 2, 64, 64) != (GpuBlocks(128, 3), GpuBlocks(64, 2))
    blocks_for.cache_clear()


def test_the_choice_of_blocks_is_said_once(caplog):
    blocks_for.cache_clear()
    with caplog.at_level(logging.INFO, "jaxserve.attention"):
        for _ in range(2):
            blocks_for("some chip", True, "bfloat16", 48, 3, 128, 64)
    (record,) = caplog.records
    assert "some chip" in record.getMessage() and "by rule" in record.getMessage()


@pytest.mark.parametrize(
    ("shares", "cores", "parts"), [(8, 132, 64), (8 * 16, 132, 4), (8 * 64, 132, 1), (64, 132, 8), (8, 1, 1)]
)
def test_few_sequences_are_cut_into_parts_that_fill_the_chip(shares, cores, parts):
    assert GpuBlocks(64, 2).splits(shares, cores) == parts


def test_what_a_gpu_cannot_do_is_refused():
    bfloat16 = jnp.dtype("bfloat16")
    validate_for_gpu(64, bfloat16, 256, "8.0")
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
    with pytest.raises(ValueError, match="a cache of the queries' type; found bfloat16 and float32"):
        gpu.ragged_paged_attention(*args[:3], args[3].astype("bfloat16"), *args[4:], scale=1.0)
    scales = jnp.zeros((args[3].shape[0], 2, args[3].shape[1]), jnp.float32)
    with pytest.raises(ValueError, match="do not read an Int8Cache; use the reference"):
        gpu.ragged_paged_attention(*args[:3], Int8Cache(args[3].astype("int8"), scales), *args[4:], scale=1.0)


def test_the_kernel_is_chosen_on_gpu_only():
    for capability in ("8.0", "9.0", "12.1"):
        name, reason, kernel = attention.choose("auto", "gpu", capability=capability, head_dim=128)
        assert (name, reason, kernel) == ("gpu", "auto on gpu", gpu.ragged_paged_attention)
    with pytest.raises(ConfigError, match="attention='gpu' does not run on cpu; use auto"):
        attention.choose("gpu", "cpu")


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (dict(capability="7.5"), "capability 8.0 or above; the device has 7.5"),
        (dict(kv_dtype="int8"), "does not read a cache of int8"),
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
