"""A KV cache of bytes: what it keeps, every body that reads it, and the engine that serves from it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_layout import kept_by, rows_of
from test_kernels import PAGE, body_of, oracle, random_batch

from jaxserve import LLM, SamplingParams, attention, loading
from jaxserve.batch import Shape
from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions, ScheduleOptions
from jaxserve.errors import ConfigError
from jaxserve.metrics import EngineMetrics
from jaxserve.runner import Runner
from kernels_pallas.ragged_paged_attention.contract import Int8Cache, quantised

BODIES = attention.READS_INT8
COMPILED = [body for body in BODIES if body not in ("gpu", "tpu")]
"""The GPU's and the TPU's are interpreted here and take seconds to compile."""
HEADS = [
    (4, 4, 16, {}),
    (7, 1, 12, {"window": 7}),
    (16, 2, 64, {"soft_cap": 0.7, "sinks": np.linspace(-6, 9, 16).astype(np.float32)}),
    (4, 2, 16, {"causal": False}),
]
"""(heads, kv_heads, head_dim, options)"""


def int8_batch(seed, *, body, kv_heads=2, **sizes):
    """Like random_batch, the past kept as bytes; scales of unwritten memory are NaN, its bytes anything.

    Returns the arguments and what the sequences' keys and values are after rounding.
    """
    rng = np.random.default_rng(seed)
    args, kv = random_batch(rng, kv_heads=kv_heads, body="reference", **sizes)
    pages, page, row = args[3].shape
    values, scales = in_bytes(args[3].reshape(pages, page, kv_heads, 2, -1))
    values = np.where(np.isnan(scales)[..., None], rng.integers(-128, 128, values.shape), values).astype(np.int8)
    values = values.reshape(pages, page, row)
    values = kept_by(body, values, kv_heads)
    scales = scales.reshape(pages, page, -1).transpose(0, 2, 1)
    args[3] = Int8Cache(jnp.asarray(values), jnp.asarray(scales))
    values, scales = in_bytes(np.concatenate(kv))
    return args, np.split(values * scales[..., None], np.cumsum([len(rows) for rows in kv])[:-1])


def in_bytes(x):
    """`quantised` as one program: by itself it is a dozen, each of which is compiled."""
    return tuple(np.asarray(a) for a in jax.jit(quantised)(x))


def test_what_is_kept_is_within_half_a_step_and_never_spoils_a_neighbour():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(9, 64)).astype(np.float32) * np.float32(10.0) ** np.arange(-20, 25, 5)[:, None]
    values, scales = (np.asarray(a) for a in quantised(jnp.asarray(x)))
    assert (np.abs(values).max(axis=1) == 127).all()
    assert (np.abs(values * scales[:, None] - x) <= scales[:, None] * 0.5001).all()
    ties = jnp.asarray([[127.0, 0.5, 1.5, -2.5]])
    assert np.asarray(quantised(ties)[0]).tolist() == [[127, 0, 2, -2]], "ties to even"
    for row in (np.zeros(4), np.full(4, 1e-39), np.array([1e-31, 0, 0, -1e-31])):
        values, scales = quantised(jnp.asarray(row, jnp.float32))
        assert not values.any() and scales == 0
    for wild in (np.nan, np.inf, -np.inf):
        values, scales = quantised(jnp.asarray([[1.0, wild], [1.0, 0.5]]))
        assert np.isnan(scales[0]) and not values[0].any() and scales[1] > 0


@pytest.mark.parametrize(
    ("body", "page", "case"),
    [
        *((body, PAGE, case) for body in COMPILED for case in range(len(HEADS))),
        *(pytest.param(body, 16, case, marks=pytest.mark.slow) for body in COMPILED for case in range(len(HEADS))),
        ("tpu", PAGE, 1), ("tpu", 16, 2), ("tpu", PAGE, 3), ("gpu", 16, 2),
    ],
)  # fmt: skip
def test_parity(body, page, case):
    heads, kv_heads, head_dim, how = HEADS[case]
    run = jax.jit(partial(body_of(body), scale=0.3, **how))
    case = dict(q_lens=[1] * 9 + [3, 65, 1, 9], pasts=[0, 300, 5, 63, 64, 65, 1, 16, 15, 4, 0, 9, 130])
    sizes = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page, body=body)
    args, kv = int8_batch(3, **sizes, **case)
    out, cache = run(*args)
    args[3] = 0
    options = [how.get(name) for name in ("window", "soft_cap", "sinks")]
    want = oracle(args, kv, 0.3, *options, causal=how.get("causal", True))
    np.testing.assert_allclose(np.asarray(out)[: len(want)], want, rtol=2e-5, atol=2e-5)
    assert np.isfinite(np.asarray(out)).all(), "padding rows must stay finite"
    table, values = np.asarray(args[5]), rows_of(body, np.asarray(cache.values), kv_heads)
    scales = np.asarray(cache.scales).transpose(0, 2, 1)  # [P, page, K*2]
    for s, rows in enumerate(kv):  # what was written is exactly what the contract says of k and v
        got = values[table[s]].reshape(-1, kv_heads, 2, head_dim)[: len(rows)]
        scale = scales[table[s]].reshape(-1, kv_heads, 2, 1)[: len(rows)]
        np.testing.assert_array_equal(got.astype(np.float32) * scale, rows)
    assert np.isfinite(scales).sum() == 2 * kv_heads * sum(map(len, kv)), "wrote outside its pages"


@pytest.mark.parametrize("head_dim", [12, 64])
def test_groups_of_positions_give_the_bits_that_rows_give(head_dim):
    run = jax.jit(partial(body_of("cpu"), scale=0.3))
    found = []
    for page in (PAGE, 16, 48):
        sizes = dict(heads=6, kv_heads=2, head_dim=head_dim, page=page, pages=700 // (page // 4))
        args, _ = int8_batch(5, body="cpu", **sizes, q_lens=[1] * 12 + [3, 60], pasts=[*range(0, 240, 20), 9, 130])
        found.append(np.asarray(run(*args)[0]))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("page", [PAGE, 16], ids=["page4", "page16"])
def test_a_prompt_is_the_same_however_it_is_cut_and_in_a_crowd(page):
    """Bit for bit, of the C++ kernel."""
    run = jax.jit(partial(body_of("cpu"), scale=0.2, window=150))
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(rng.normal(size=(200, n, 24)), jnp.float32) for n in (6, 2, 2))
    table = jnp.asarray(rng.permutation(80)[None, : 208 // page], jnp.int32)

    def cut(*sizes, others=0):
        """The prompt in pieces; each beside `others` more of its own first tokens, in other pages."""
        values = jnp.asarray(rng.integers(-128, 128, (80 + others, page, 96)), jnp.int8)
        cache, out, done = Int8Cache(values, jnp.full((80 + others, 4, page), jnp.nan)), [], 0
        for size in sizes:
            piece = slice(done, done + size)
            done += size
            crowd = [jnp.concatenate([*[a[:1]] * others, a[piece]]) for a in (q, k, v)]
            lens, cu = [1] * others + [done], [*range(others + 1), others + size]
            far = jnp.zeros((others, table.shape[1]), jnp.int32).at[:, 0].set(80 + jnp.arange(others, dtype=jnp.int32))
            step = [lens, jnp.concatenate([far, table]), cu, [others, others, others + 1]]
            some, cache = run(*crowd, cache, *(jnp.asarray(a, jnp.int32) for a in step))
            out.append(np.asarray(some)[others:])
        return np.concatenate(out)

    whole = cut(200)
    for sizes, others in (([1] * 200, 0), ([7, 64, 1, 128], 3), ([63, 137], 0), ([199, 1], 9)):
        np.testing.assert_array_equal(cut(*sizes, others=others), whole)


@pytest.mark.parametrize("body", BODIES)
def test_contract_names_what_is_wrong(body):
    kernel = partial(body_of(body), scale=1.0)
    args, _ = int8_batch(0, body=body, heads=4, head_dim=8, q_lens=[2], pasts=[0])
    good = args[3]
    for cache, message in (
        (good.values, "cache must be of floats, or an Int8Cache; found int8"),
        (Int8Cache(good.values, good.scales[:, 1:]), r"scales \[700, 4, 4\]; found int8 and float32 \[700, 3, 4\]"),
        (Int8Cache(good.values, good.scales.astype(jnp.bfloat16)), "found int8 and bfloat16"),
        (Int8Cache(good.values.astype(jnp.float32), good.scales), "found float32 and float32"),
        (Int8Cache(good.values[:, :, 1:], good.scales), "cache must be"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(*args[:3], cache, *args[4:])


@pytest.mark.parametrize("body", COMPILED)  # an interpreted kernel copies what it is given; see tools/compile_gate.py
@pytest.mark.parametrize("q_lens", [[1], [1, 9]], ids=str)
def test_both_arrays_are_updated_in_place(body, q_lens):
    def sizes(pages):
        args, _ = int8_batch(
            0, body=body, heads=4, head_dim=64, q_lens=q_lens, pasts=[5] * len(q_lens),
            pages=pages, tokens=sum(q_lens), seqs_total=len(q_lens),
        )  # fmt: skip
        memory = jax.jit(partial(body_of(body), scale=1.0), donate_argnums=3).lower(*args).compile().memory_analysis()
        return sum(a.nbytes for a in jax.tree.leaves(args[3])), memory.alias_size_in_bytes, memory.temp_size_in_bytes

    cache, alias, temp = sizes(100)
    big_cache, big_alias, big_temp = sizes(2000)
    assert alias >= cache and big_alias >= big_cache
    assert big_temp - temp < (big_cache - cache) / 100, "a copy, of the scales alone"


PROMPT = "The capital of France is Paris. Seven plus five is twelve. Once upon a time there was"


def test_the_engine_serves_from_it():
    """With nearly the log-probabilities of a cache of floats, and on CPU the same bits after a prefix hit."""
    body_of("cpu")
    found = {}
    for body, kind in (("cpu", "float32"), ("cpu", "int8"), ("reference", "int8")):
        options = dict(num_kv_pages=32, max_num_seqs=2, max_num_batched_tokens=64, warmup="lazy")
        with LLM(attention=body, kv_cache_dtype=kind, **options) as llm:
            ids = llm.text.encode_prompt(PROMPT)
            found[body, kind] = np.array(llm.score([ids[:1]], [ids[1:]])[0].token_logprobs)
            if (body, kind) == ("cpu", "int8"):
                greedy = SamplingParams(max_tokens=4, temperature=0, logprobs=0)
                miss, hit = (llm.generate([ids], greedy)[0] for _ in range(2))
                assert hit.num_cached_tokens > 0 and miss.outputs[0].text and hit.outputs == miss.outputs
    assert 0 < np.abs(found["cpu", "int8"] - found["cpu", "float32"]).mean() < 0.02
    assert np.abs(found["reference", "int8"] - found["cpu", "int8"]).mean() < 0.01


def test_pages_are_sized_by_values_and_scales():
    said = []
    device = DeviceOptions(kv_cache_dtype="int8", num_kv_pages=64, block_size=4, warmup="lazy")
    schedule = ScheduleOptions(max_num_seqs=4, max_num_batched_tokens=16)
    model = Path(__file__).parent / "goldens" / "llama2"
    runner = Runner(EngineOptions(schedule=schedule, device=device), model, EngineMetrics("test"), said.append)
    layers, kv_heads, head_dim = 2, 4, 12
    bytes_ = 64 * 4 * layers * kv_heads * 2 * (head_dim + 4)
    assert runner.info.device_bytes["kv"] == bytes_
    assert f"KV {bytes_ / 2**30:.2f} (int8, 64 pages of 4 tokens: 256 tokens)" in said[-1]
    for shape in (Shape(1, 1), Shape(16, 4)):
        big = runner._compile(shape, replace(runner.sizes, num_pages=6400)).memory_analysis()
        assert big.alias_size_in_bytes >= 100 * bytes_, "the donated cache is the result"
        assert big.temp_size_in_bytes < 100 * bytes_ / 10, "a copy of the cache"


def test_what_does_not_read_it_is_refused():
    device = DeviceOptions(kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match="int8 is not served by the attention kernel 'other'; give --attention ref"):
        loading.kv_dtype_for(ModelOptions(), device, "other", {}, np.dtype(np.float32))
