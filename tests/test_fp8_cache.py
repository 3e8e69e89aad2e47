"""A KV cache of E4M3: what it keeps, that nothing becomes NaN in it, what reads it, and the engine that serves it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import body_of, oracle, random_batch

from jaxserve import LLM, attention
from jaxserve.config import DeviceOptions
from jaxserve.errors import ConfigError
from kernels_pallas.ragged_paged_attention.contract import narrowed

FP8 = "float8_e4m3fn"


def test_what_is_beyond_its_range_becomes_its_largest_number():
    x = jnp.asarray([0.0, 1.0625, 448.0, 460.0, 470.0, -1e9, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    kept = np.asarray(narrowed(x, FP8), np.float32)
    np.testing.assert_array_equal(kept, [0, 1, 448, 448, 448, -448, 448, -448, np.nan])
    assert np.isnan(np.asarray(x.astype(FP8), np.float32)[4]), "which a cast would make NaN"
    for other in (jnp.bfloat16, jnp.float32):
        np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (narrowed(x, other), x.astype(other))))


@pytest.mark.parametrize("body", attention.READS_FP8)
def test_parity_with_keys_and_values_beyond_its_range(body):
    """The truth is attention over what the cache keeps; what is not written is NaN."""
    rng = np.random.default_rng(6)
    case = dict(q_lens=[1, 1, 5, 9], pasts=[0, 90, 13, 40], tokens=32, seqs_total=5, pages=120)
    args, kv = random_batch(rng, heads=4, kv_heads=2, head_dim=16, **case)
    args[5] = args[5][:, :24]
    args[1], args[2] = (a.at[1].multiply(1e4).at[3].set(-1e30) for a in args[1:3])
    args[3] = args[3].astype(FP8)
    starts, total = np.asarray(args[6]), sum(case["q_lens"])
    new = np.stack([np.asarray(a) for a in args[1:3]], axis=2)[:total]  # [T, K, 2, H]
    for s, past in enumerate(case["pasts"]):
        kv[s][past:] = new[starts[s] : starts[s + 1]]
    kv = [np.asarray(narrowed(jnp.asarray(rows), FP8), np.float32) for rows in kv]
    assert max(np.abs(rows).max() for rows in kv) == 448
    out, cache = jax.jit(partial(body_of(body), scale=1e-3))(*args)
    np.testing.assert_allclose(np.asarray(out)[:total], oracle(args, kv, 1e-3, None), rtol=2e-5, atol=2e-4)
    table = np.asarray(args[5])
    for s, rows in enumerate(kv):
        got = np.asarray(cache, np.float32)[table[s]].reshape(-1, *rows.shape[1:])[: len(rows)]
        np.testing.assert_array_equal(got, rows)


def test_the_cpus_kernel_does_not_take_it(compiler):
    args, _ = random_batch(np.random.default_rng(0), heads=4, kv_heads=2, head_dim=8, q_lens=[2], pasts=[0])
    with pytest.raises(ValueError, match="does not read a cache of float8_e4m3fn"):
        body_of("cpu")(*args[:3], args[3].astype(FP8), *args[4:], scale=1.0)
    for name in ("auto", "cpu"):
        with pytest.raises(ConfigError, match="give --kv-cache-dtype int8, which takes as much memory, or --attention"):
            attention.choose(name, "cpu", kv_dtype=FP8)
    assert attention.choose("reference", "cpu", kv_dtype=FP8)[0] == "reference"


def test_the_engine_serves_from_it():
    """In pages of its size, and with nearly the log-probabilities of a cache of floats."""
    body_of("cpu")
    found = {}
    for body, kind in (("cpu", "float32"), ("reference", "fp8_e4m3")):
        options = dict(num_kv_pages=32, max_num_seqs=2, max_num_batched_tokens=64, warmup="lazy")
        with LLM(attention=body, kv_cache_dtype=kind, **options) as llm:
            ids = llm.text.encode_prompt("The capital of France is Paris. Seven plus five is twelve.")
            found[kind] = np.array(llm.score([ids[:1]], [ids[1:]])[0].token_logprobs)
            found[kind, "bytes"] = llm.text.client.info.device_bytes["kv"]
    assert 0 < np.abs(found["fp8_e4m3"] - found["float32"]).mean() < 0.1
    assert found["fp8_e4m3", "bytes"] * 4 == found["float32", "bytes"]
    assert DeviceOptions(kv_cache_dtype=FP8).kv_dtype == DeviceOptions(kv_cache_dtype="fp8_e4m3").kv_dtype == FP8
