"""Every body of ragged paged attention against a dense oracle: random ragged batches, NaN in all unwritten memory."""

from functools import partial
from importlib import import_module
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_layout import kept_by, rows_of

from jaxserve import attention, native
from jaxserve.native.build import BuildError, find_compiler
from kernels_pallas.ragged_paged_attention.contract import Int8Cache, aligned, quantised
from kernels_pallas.ragged_paged_attention.tuning import Blocks
from kernels_pallas.ragged_paged_attention.tuning.gpu import GpuBlocks

PAGE = 4
BODIES = sorted(attention.KERNELS)
COMPILED = [body for body in BODIES if body not in ("gpu", "tpu")]
"""The TPU's and the GPU's are interpreted here and take seconds to compile; tests/test_attention_tpu.py and
test_attention_gpu.py have more of them."""


def combinations(*axes, interpreted):
    """(body, value of each axis) for every combination; for interpreted bodies those of these numbers only: for the
    GPU's the first."""
    some = dict.fromkeys(COMPILED, range(10**6)) | {"tpu": interpreted, "gpu": interpreted[:1]}
    return [(body, *values) for body in BODIES for i, values in enumerate(product(*axes)) if i in some[body]]


def body_of(name):
    """The kernel of that name; skips the test where it cannot be had."""
    if name == "cpu":
        try:
            find_compiler()
        except BuildError as error:
            pytest.skip(str(error))
        native.load()
    if name == "tpu":
        kernel = import_module(attention.KERNELS[name]).ragged_paged_attention
        return partial(kernel, interpret=True, decode=Blocks(1, 4, 2), prefill=Blocks(16, 3, 3))
    if name == "gpu":
        kernel = import_module(attention.KERNELS[name]).ragged_paged_attention
        return partial(kernel, interpret=True, decode=GpuBlocks(32, 2, 1), prefill=GpuBlocks(64, 2))
    return import_module(attention.KERNELS[name]).ragged_paged_attention


def random_batch(
    rng, *, heads, kv_heads, head_dim, q_lens, pasts, pages=700, tokens=128, seqs_total=24, page=PAGE, body="reference"
):
    """A step whose sequences have `pasts` cached tokens and `q_lens` new ones; returns the arguments and the truth."""
    seqs, total = len(q_lens), sum(q_lens)
    pad_tokens, pad_seqs = tokens - total, seqs_total - seqs
    lens = [p + n for p, n in zip(pasts, q_lens, strict=True)]
    width = -(-310 // page)
    table = np.zeros((seqs + pad_seqs, width), np.int32)
    cache = np.full((pages, page, kv_heads * 2 * head_dim), np.nan, np.float32)
    kv = [rng.normal(size=(n, kv_heads, 2, head_dim)).astype(np.float32) for n in lens]
    free = list(np.random.default_rng(0).permutation(pages))
    new = []
    for s in range(seqs):
        own = [free.pop() for _ in range(-(-lens[s] // page))]
        table[s, : len(own)] = own
        for i in range(pasts[s]):
            cache[own[i // page], i % page] = kv[s][i].reshape(-1)
        new.append(kv[s][pasts[s] :])
    new = np.concatenate([*new, np.full((pad_tokens, kv_heads, 2, head_dim), np.nan, np.float32)])
    q = rng.normal(size=(total + pad_tokens, heads, head_dim)).astype(np.float32)
    decodes = next((i for i, n in enumerate(q_lens) if n != 1), seqs)
    cu = np.zeros(seqs + pad_seqs + 1, np.int32)
    cu[1 : seqs + 1] = np.cumsum(q_lens)
    cu[seqs + 1 :] = total
    kv_lens = np.array([*lens, *[0] * pad_seqs], np.int32)
    cache = kept_by(body, cache, kv_heads)
    args = (q, new[:, :, 0], new[:, :, 1], cache, kv_lens, table, cu, np.array([decodes, decodes, seqs], np.int32))
    return [jnp.asarray(a) for a in args], kv


def oracle(args, kv, scale, window, soft_cap=None, sinks=None, causal=True):
    q, _, _, _, _, _, cu, _ = (np.asarray(a) for a in args)
    out = []
    for s, rows in enumerate(kv):
        queries = q[cu[s] : cu[s + 1]]
        for i, query in enumerate(queries):
            end = len(rows) - len(queries) + i + 1 if causal else len(rows)
            start = 0 if window is None else max(0, end - window)
            group = query.shape[0] // rows.shape[1]
            for head in range(query.shape[0]):
                k, v = rows[start:end, head // group, 0], rows[start:end, head // group, 1]
                score = k @ query[head] * scale
                if soft_cap is not None:
                    score = soft_cap * np.tanh(score / soft_cap)
                sink = -np.inf if sinks is None else sinks[head]
                weight = np.exp(score - max(score.max(), sink))
                out.append(weight @ v / (weight.sum() + np.exp(sink - max(score.max(), sink))))
    return np.array(out).reshape(-1, q.shape[1], q.shape[2])


HEADS = [(4, 4, 16), (4, 2, 8), (7, 1, 12), (2, 1, 64)]


@pytest.mark.parametrize(
    ("body", "window", "page", "sizes"),
    combinations([None, 7], [PAGE, 16], HEADS, interpreted=(0, 5, 10, 15)),
    ids=lambda v: str(v),
)
def test_parity(body, window, page, sizes):
    kernel = body_of(body)
    heads, kv_heads, head_dim = sizes
    rng = np.random.default_rng(heads * 100 + head_dim)
    cases = [
        dict(q_lens=[1, 1, 1], pasts=[0, 5, 300]),
        dict(q_lens=[70], pasts=[0]),
        dict(q_lens=[1] * 19 + [3, 65, 1, 9], pasts=[int(i) for i in rng.integers(0, 40, 19)] + [4, 0, 9, 130]),
    ]
    run = jax.jit(lambda *a: kernel(*a, scale=0.3, window=window))
    for case in cases:
        sizes = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page, body=body)
        args, kv = random_batch(rng, **sizes, **case)
        out, cache = run(*args)
        want = oracle(args, kv, 0.3, window)
        np.testing.assert_allclose(np.asarray(out)[: len(want)], want, rtol=2e-5, atol=2e-5)
        assert np.isfinite(np.asarray(out)).all(), "padding rows must stay finite"
        table, seen, cache = np.asarray(args[5]), 0, rows_of(body, np.asarray(cache), kv_heads)
        for s, rows in enumerate(kv):  # what was written is exactly k and v
            got = cache[table[s]].reshape(-1, kv_heads, 2, head_dim)[: len(rows)]
            np.testing.assert_array_equal(got, rows)
            seen += len(rows)
        assert np.isfinite(cache).all(axis=-1).sum() == seen, "wrote outside its pages"


@pytest.mark.parametrize("head_dim", [12, 64])
@pytest.mark.parametrize("held", ["float32", "bfloat16", "float16"])
def test_groups_of_positions_give_the_bits_that_rows_give(head_dim, held):
    kernel = body_of("cpu")
    run = jax.jit(lambda *a: kernel(*a, scale=0.3)[0])
    found = []
    for page in (PAGE, 16, 48):
        sizes = dict(heads=6, kv_heads=2, head_dim=head_dim, page=page, body="cpu", pages=700 // (page // 4))
        args, _ = random_batch(
            np.random.default_rng(5), **sizes, q_lens=[1] * 12 + [3, 60], pasts=[*range(0, 240, 20), 9, 130]
        )
        found.append(np.asarray(run(*args[:3], args[3].astype(held), *args[4:])))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


# A cap that bends every score, and sinks from next to nothing to nearly all of a head's weight.
CAPS = [
    dict(soft_cap=0.7),
    dict(sinks=np.linspace(-6, 9, 4).astype(np.float32)),
    dict(soft_cap=50.0, sinks=np.linspace(2, -3, 4).astype(np.float32)),
]


@pytest.mark.parametrize(
    ("body", "window", "caps"),
    combinations([None, 7], CAPS, interpreted=(1, 5)),
    ids=lambda v: "+".join(v) if isinstance(v, dict) else str(v),
)
def test_parity_with_soft_cap_and_sinks(body, window, caps):
    kernel = body_of(body)
    rng = np.random.default_rng(11)
    run = jax.jit(lambda *a: kernel(*a, scale=0.9, window=window, **caps))
    plain = jax.jit(lambda *a: kernel(*a, scale=0.9, window=window))
    for case in (
        dict(q_lens=[1, 1, 1], pasts=[0, 5, 300]),
        dict(q_lens=[1] * 9 + [3, 65, 1], pasts=[int(i) for i in rng.integers(0, 40, 9)] + [4, 0, 130]),
    ):
        args, kv = random_batch(rng, heads=4, kv_heads=2, head_dim=12, **case)
        out, want = np.asarray(run(*args)[0]), oracle(args, kv, 0.9, window, **caps)
        np.testing.assert_allclose(out[: len(want)], want, rtol=2e-5, atol=2e-5)
        assert np.isfinite(out).all(), "padding rows must stay finite"
        assert np.abs(out - np.asarray(plain(*args)[0])).max() > 1e-3, "it made no difference"


@pytest.mark.parametrize(
    ("body", "page", "head_dim"),
    [*((body, page, head_dim) for body in COMPILED for page, head_dim in ((PAGE, 12), (16, 16))), ("tpu", PAGE, 12)],
)
def test_parity_where_every_token_sees_its_whole_sequence(body, page, head_dim):
    kernel = body_of(body)
    rng = np.random.default_rng(21)
    run = jax.jit(lambda *a: kernel(*a, scale=0.3, causal=False))
    for case in (dict(q_lens=[70], pasts=[0]), dict(q_lens=[1, 1, 3, 65, 1, 40, 9], pasts=[0, 0, 0, 0, 0, 0, 30])):
        args, kv = random_batch(rng, heads=4, kv_heads=2, head_dim=head_dim, page=page, body=body, **case)
        out, _ = run(*args)
        want = oracle(args, kv, 0.3, None, causal=False)
        np.testing.assert_allclose(np.asarray(out)[: len(want)], want, rtol=2e-5, atol=2e-5)
        assert np.isfinite(np.asarray(out)).all(), "padding rows must stay finite"


@pytest.mark.parametrize("body", COMPILED)
@pytest.mark.parametrize("caps", [*CAPS, dict(causal=False)], ids=lambda c: "+".join(c))
def test_bodies_agree_with_dense(body, caps):
    """`attention.dense` is what model files are tested with."""
    rng = np.random.default_rng(12)
    args, _ = random_batch(rng, heads=4, kv_heads=2, head_dim=12, q_lens=[100], pasts=[0], tokens=100, seqs_total=1)
    for window in (None, 9) if caps.get("causal", True) else (None,):
        out, _ = body_of(body)(*args, scale=0.9, window=window, **caps)
        want, _ = attention.dense(0, *args[:3], jnp.zeros(()), scale=0.9, window=window, **caps)
        np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("body", "caps"),
    combinations([{}, *CAPS], interpreted=(0,)),
    ids=lambda v: v if isinstance(v, str) else "+".join(v) or "plain",
)
def test_a_sequence_is_the_same_alone_and_in_a_crowd(body, caps):
    kernel = body_of(body)
    rng = np.random.default_rng(3)
    run = jax.jit(lambda *a: kernel(*a, scale=0.25, **caps))
    args, _ = random_batch(
        rng, heads=4, kv_heads=2, head_dim=16, q_lens=[1] * 20 + [40], pasts=[9 * i for i in range(21)]
    )
    crowd = np.asarray(run(*args)[0])
    q, k, v, cache, kv_lens, table, cu, dist = args
    q, k, v, cache, kv_lens, table, _, _ = args
    cu, dist = jnp.array([0, 1, 1], jnp.int32), jnp.array([1, 1, 1], jnp.int32)
    for s in (0, 7, 19):
        alone = [jnp.concatenate([a[s : s + 1], jnp.zeros_like(a[:1])]) for a in (q, k, v, kv_lens, table)]
        out, _ = run(*alone[:3], cache, *alone[3:], cu, dist)
        tolerance = 0 if body == "cpu" else 1e-6  # the C++ kernels promise every bit
        np.testing.assert_allclose(np.asarray(out)[0], crowd[s], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("body", "page", "held"),
    [
        *((body, page, np.float32) for body in BODIES for page in (PAGE, 16)),
        *((body, 16, np.int8) for body in attention.READS_INT8),
        ("cpu", 16, np.float16), ("cpu", 48, np.float32), ("reference", 48, np.float32),
    ],
    ids=str,
)  # fmt: skip
def test_with_a_window_only_its_pages_are_read(body, page, held):
    """Pages before it may be anybody's and hold NaN, and positions may be counted from further on: no bit changes."""
    kernel, window = body_of(body), 7
    q_lens, pasts = [1, 1, 1, 1, 40, 9], [3, 300, 130, 191, 200, 255]
    pages = 700 // (page // PAGE)
    args, kv = random_batch(
        np.random.default_rng(4), heads=4, kv_heads=2, head_dim=16, page=page, pages=pages, body=body,
        q_lens=q_lens, pasts=pasts,
    )  # fmt: skip
    if held == np.int8:  # what those pages hold is NaN by their scales
        rows = rows_of(body, np.asarray(args[3]), 2)
        values, scales = quantised(jnp.asarray(rows.reshape(*rows.shape[:2], 4, 16)))
        values = kept_by(body, np.asarray(values).reshape(rows.shape), 2)
        args[3] = Int8Cache(jnp.asarray(values), jnp.asarray(scales).transpose(0, 2, 1))
    else:
        args[3] = args[3].astype(held)
    run = jax.jit(lambda *a: kernel(*a, scale=0.3, window=window)[0])
    whole = np.asarray(run(*args))
    if held != np.int8:
        want = oracle(args, kv, 0.3, window)
        np.testing.assert_allclose(
            whole[: len(want)], want, **dict.fromkeys(("rtol", "atol"), 2e-5 * (held == np.float32) or 2e-3)
        )
    table, lens = np.array(args[5]), np.array(args[4])
    nobody = next(p for p in range(pages) if p not in table)
    first = [max(0, past - window + 1) // page for past in pasts]
    for s, end in enumerate(first):
        table[s, :end] = nobody
    assert sum(first) > 0
    np.testing.assert_array_equal(np.asarray(run(*args[:5], jnp.asarray(table), *args[6:])), whole)
    step = aligned(page)
    for s, end in enumerate(first):
        begin = end * page // step * step
        table[s] = np.roll(table[s], -begin // page)
        lens[s] -= begin
    assert lens.max() < 260
    moved = np.asarray(run(*args[:4], jnp.asarray(lens), jnp.asarray(table), *args[6:]))
    np.testing.assert_array_equal(moved, whole)


@pytest.mark.parametrize("body", BODIES)
def test_pages_are_counted_from_the_first(body):
    """A layer's pages may begin anywhere in the cache, by a number that is traced as well."""
    kernel, first = body_of(body), 31
    args, _ = random_batch(
        np.random.default_rng(6), heads=4, kv_heads=2, head_dim=16, q_lens=[1, 20], pasts=[40, 30], body=body
    )
    run = jax.jit(lambda first_page, *a: kernel(*a, scale=0.3, first_page=first_page))
    want, cache = run(0, *args)
    before = jnp.full((first, *args[3].shape[1:]), jnp.nan)
    args[3] = jnp.concatenate([before, args[3]])
    out, moved = run(first, *args)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(moved[first:], cache)
    assert np.isnan(moved[:first]).all()


@pytest.mark.parametrize("body", BODIES)
def test_contract_names_what_is_wrong(body):
    kernel = body_of(body)
    args, _ = random_batch(np.random.default_rng(0), heads=4, kv_heads=2, head_dim=8, q_lens=[2], pasts=[0])
    with pytest.raises(ValueError, match="cache must be"):
        kernel(args[0], args[1], args[2], args[3][:, :, 1:], *args[4:], scale=1.0)
    with pytest.raises(ValueError, match="heads a multiple"):
        kernel(args[0][:, :3], *args[1:], scale=1.0)
    with pytest.raises(ValueError, match="window"):
        kernel(*args, scale=1.0, window=0)
    with pytest.raises(ValueError, match="a window is that of causal attention; found 3 with causal=False"):
        kernel(*args, scale=1.0, window=3, causal=False)
    for soft_cap in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="soft_cap must be a number above 0"):
            kernel(*args, scale=1.0, soft_cap=soft_cap)
    with pytest.raises(ValueError, match=r"sinks must be \[4\], one logit a query head; found \(2,\)"):
        kernel(*args, scale=1.0, sinks=jnp.zeros(2))


@pytest.mark.parametrize("body", COMPILED)  # an interpreted kernel copies what it is given; see tools/compile_gate.py
@pytest.mark.parametrize("q_lens", [[1], [1, 1], [1, 1, 9]], ids=str)
def test_the_cache_is_updated_in_place(body, q_lens):
    """The donated cache is the result, and what the step needs besides does not grow with it."""
    kernel = body_of(body)

    def sizes(pages):
        args, _ = random_batch(
            np.random.default_rng(0), heads=4, kv_heads=2, head_dim=8, q_lens=q_lens, pasts=[5] * len(q_lens),
            pages=pages, tokens=sum(q_lens), seqs_total=len(q_lens),
        )  # fmt: skip
        run = jax.jit(lambda *a: kernel(*a, scale=1.0), donate_argnums=3)
        memory = run.lower(*args).compile().memory_analysis()
        return args[3].nbytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes

    cache, alias, temp = sizes(100)
    big_cache, big_alias, big_temp = sizes(4000)
    assert alias >= cache and big_alias >= big_cache
    assert big_temp - temp < (big_cache - cache) / 10
