"""The TPU kernel without a TPU: its shapes and types under the plain interpreter, its copies under the TPU's."""

import json
import logging
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted_runs import runs_of
from test_kernels import oracle, random_batch

from jaxserve import attention
from jaxserve.errors import ConfigError
from kernels_pallas.ragged_paged_attention import tpu, tuning
from kernels_pallas.ragged_paged_attention.contract import validate_for_tpu
from kernels_pallas.ragged_paged_attention.tuning import Blocks, blocks_for

FLOAT8 = "float8_e4m3fn"

# Sixteen heads of one k, windows that repeat every 1, 2 and 4 heads, more heads than a turn of the kernel takes.
CASES = [
    dict(heads=16, kv_heads=1, head_dim=64, q="bfloat16", kept="bfloat16"),
    dict(heads=8, kv_heads=8, head_dim=80, q="bfloat16", kept=FLOAT8),
    dict(heads=4, kv_heads=4, head_dim=96, q="float32", kept="float32", window=20, soft_cap=3.0),
    dict(heads=2, kv_heads=1, head_dim=192, q="bfloat16", kept="bfloat16", window=33),
    dict(heads=6, kv_heads=6, head_dim=128, q="float32", kept="bfloat16"),
    dict(heads=2, kv_heads=1, head_dim=256, q="bfloat16", kept=FLOAT8),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['heads']}-{c['kv_heads']}x{c['head_dim']}-{c['kept']}")
def test_shapes_and_types(case):
    """Against float64, from the keys and values as the cache keeps them; what is not written is NaN."""
    sizes = {name: case[name] for name in ("heads", "kv_heads", "head_dim")}
    options = {name: case[name] for name in ("window", "soft_cap") if name in case}
    rng = np.random.default_rng(2)
    args, kv = random_batch(
        rng,
        **sizes,
        page=8,
        pages=120,
        tokens=80,
        seqs_total=8,
        q_lens=[1, 1, 5, 40, 1, 17],
        pasts=[0, 90, 50, 9, 3, 0],
    )
    kept = jnp.dtype(case["kept"])
    args = [a.astype(case["q"]) for a in args[:3]] + [args[3].astype(case["q"]).astype(kept), *args[4:]]
    args[5] = args[5][:, :12]
    run = jax.jit(
        partial(
            tpu.ragged_paged_attention, scale=0.2, interpret=True, decode=Blocks(1, 4, 2), prefill=Blocks(16, 2, 3),
            **options,
        )
    )  # fmt: skip
    out, cache = run(*args)
    kv = [np.asarray(jnp.asarray(rows).astype(case["q"]).astype(kept), np.float64) for rows in kv]
    want = oracle([np.asarray(args[0], np.float64), *args[1:]], kv, 0.2, case.get("window"), case.get("soft_cap"))
    close = 2e-5 if case["q"] == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float64)[: len(want)], want, rtol=close, atol=close)
    assert np.isfinite(np.asarray(out, np.float32)).all(), "padding rows must stay finite"
    table = np.asarray(args[5])
    for s, rows in enumerate(kv):
        got = np.asarray(cache, np.float64)[table[s]].reshape(-1, *rows.shape[1:])[: len(rows)]
        np.testing.assert_array_equal(got, rows)


def test_pages_before_the_window_are_not_read():
    """NaN there would come through: only what follows a sequence's end is taken out of its values."""
    args, kv = random_batch(
        np.random.default_rng(4), heads=2, kv_heads=1, head_dim=8, page=8, pages=60, tokens=48, seqs_total=4,
        q_lens=[1, 1, 33], pasts=[100, 30, 70],
    )  # fmt: skip
    window, cache, table = 10, np.array(args[3]), np.asarray(args[5])
    for s, past in enumerate((100, 30, 70)):
        cache[table[s, : (past + 1 - window) // 8]] = np.nan
    args[3] = jnp.asarray(cache)
    kernel = partial(tpu.ragged_paged_attention, decode=Blocks(1, 2, 2), prefill=Blocks(16, 2, 2))
    out = jax.jit(partial(kernel, scale=0.3, window=window, interpret=True))(*args)[0]
    want = oracle(args, kv, 0.3, window)
    np.testing.assert_allclose(np.asarray(out)[: len(want)], want, rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def interpreted():
    return runs_of("tpu_interpreted.py")


SOUND = [
    *("decode", "decode, copies at once", "mixed", "mixed, copies at once", "int8", "int8, copies at once"),
    "latents, copies at once",
]


@pytest.mark.parametrize("name", SOUND)
def test_every_copy_is_waited_for_and_no_two_touch_one_buffer(interpreted, name):
    run = interpreted[name]
    assert run["raised"] is None and run["error"] < 2e-5, run
    assert not run["race"] and not run["left"]


def test_the_interpreter_finds_planted_bugs(interpreted):
    assert not interpreted["no wait"]["finite"], "what was never fetched is NaN"
    assert not interpreted["int8, no wait for scales"]["finite"], "their copies are waited for by themselves"
    assert interpreted["int8, buffer filled while read"]["race"]
    assert interpreted["latents, buffer filled while read"]["race"]
    assert interpreted["no wait, copies at once"]["left"]
    assert interpreted["buffer filled while read"]["race"]
    assert "out-of-bounds" in interpreted["page of nobody"]["raised"].lower()


def test_entries_of_the_tuning_file_are_sound():
    entries = json.loads((Path(tuning.__file__).parent / "tpu.json").read_text())["entries"]
    assert entries
    for entry in entries:
        assert set(entry) <= {"chip", "dtype", "heads", "kv_heads", "head_dim", "page", "decode", "prefill", "source"}
        assert entry["source"], "where it comes from"
        for blocks in (Blocks(queries=1, **entry["decode"]), Blocks(**entry["prefill"])):
            assert blocks.pages >= 1 and blocks.buffers >= 2 and blocks.queries & (blocks.queries - 1) == 0
        assert entry["prefill"]["queries"] >= 16


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32])
@pytest.mark.parametrize("group", [1, 7, 16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", FLOAT8])
def test_blocks_by_rule_fit_the_smallest_chip(kv_heads, group, head_dim, dtype):
    for page in (16, 128):
        sizes = blocks_for("a chip of tomorrow", dtype, kv_heads * group, kv_heads, head_dim, page)
        for blocks, least in zip(sizes, (1, 16), strict=True):
            row = kv_heads * 2 * head_dim * jnp.dtype(dtype).itemsize
            fetched = blocks.buffers * blocks.pages * page * row
            assert fetched <= 6 << 20 or blocks.pages == 1
            assert blocks.queries >= least and blocks.queries & (blocks.queries - 1) == 0


def test_the_choice_of_blocks_is_said_once(caplog):
    blocks_for.cache_clear()
    with caplog.at_level(logging.INFO, "jaxserve.attention"):
        for _ in range(2):
            blocks_for("some chip", "bfloat16", 48, 3, 128, 64)
    (record,) = caplog.records
    assert "some chip" in record.getMessage() and "by rule" in record.getMessage()


def test_what_a_tpu_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"pages of 8 tokens of bfloat16 .* multiple of 16"):
        validate_for_tpu(8, jnp.dtype("bfloat16"), 4, 4)
    with pytest.raises(ValueError, match=r"multiple of 32"):
        validate_for_tpu(16, jnp.dtype(FLOAT8), 4, 4)
    with pytest.raises(ValueError, match=r"262144 entries.*raise the page size \(--block-size\)"):
        validate_for_tpu(128, jnp.dtype("bfloat16"), 256, 1024)
    args, _ = random_batch(np.random.default_rng(0), heads=2, kv_heads=1, head_dim=8, q_lens=[1], pasts=[0])
    with pytest.raises(ValueError, match="multiple of 8"):  # pages of 4 of float32, for a real TPU
        tpu.ragged_paged_attention(*args, scale=1.0)
    with pytest.raises(ValueError, match="scale must be a number above 0"):
        tpu.ragged_paged_attention(*args, scale=0.0, interpret=True)


def test_the_page_size_is_worked_out_by_platform():
    def size(asked, kernel, platform, seqs=256, length=8192, dtype="bfloat16"):
        return attention.page_size(asked, kernel, platform, jnp.dtype(dtype), seqs, length)

    assert size(None, "cpu", "cpu") == 16 and size(None, "reference", "gpu") == 64 and size(None, "tpu", "tpu") == 64
    assert size(None, "tpu", "tpu", length=131072) == 256, "until the page table fits"
    assert size(None, "tpu", "tpu", dtype="int8") == 128 and size(None, "cpu", "cpu", dtype="int8") == 16
    assert size(4, "cpu", "cpu") == 4 and size(48, "tpu", "tpu") == 48
    with pytest.raises(ConfigError, match=r"block_size 8: .*--block-size.* multiple of 16"):
        size(8, "tpu", "tpu")
    with pytest.raises(ConfigError, match=r"block_size 16: .*lower --max-model-len"):
        size(16, "tpu", "tpu", length=131072)


def test_the_kernel_is_chosen_on_tpu_only():
    for what in ({}, dict(kv_dtype="int8"), dict(kv_dtype=FLOAT8), dict(causal=False)):
        name, reason, kernel = attention.choose("auto", "tpu", **what)
        assert (name, reason, kernel) == ("tpu", "auto on tpu", tpu.ragged_paged_attention)
    with pytest.raises(ConfigError, match="attention='tpu' does not run on cpu; use auto"):
        attention.choose("tpu", "cpu")


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (dict(kv_dtype="int8", block_size=64), "pages of 64 tokens of int8 .* multiple of 128"),
        (dict(block_size=1), "pages of 1 tokens .* multiple of 16"),
    ],
)
def test_what_the_kernel_does_not_read_the_reference_does_and_says_so(what, why):
    name, reason, _ = attention.choose("auto", "tpu", **what)
    assert name == "reference" and re.search(f"slower by far than the TPU's own kernel, but .*{why}", reason)
    with pytest.raises(ConfigError, match=why):
        attention.choose("tpu", "tpu", **what)
