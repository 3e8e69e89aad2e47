"""Sampling on the device against the same rules written down plainly in numpy, with a sort."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import native, sampling
from jaxserve.native.build import BuildError
from jaxserve.sampling import RowParams, SlotState

S, V, L = 6, 257, 40
NEUTRAL = dict(
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
    frequency_penalty=0.0, seed=[0, 0], position=10, num_prompt=4, biased=False, allow_only=False, ban_stop=False,
    logprobs=False,
)  # fmt: skip
DTYPES = {float: np.float32, int: np.int32, bool: np.bool_, list: np.uint32}


def row_params(rows=S, **columns):
    """RowParams of that many rows; a scalar is for all of them."""
    arrays = {}
    for name, default in NEUTRAL.items():
        dtype = DTYPES[type(default)]
        shape = (rows, 2) if name == "seed" else (rows,)
        arrays[name] = jnp.asarray(np.broadcast_to(np.asarray(columns.get(name, default), dtype), shape))
    return RowParams(**arrays)


def state(rng):
    empty = SlotState.empty(S + 2, L, 8, 4)
    return replace(empty, history=jnp.asarray(rng.integers(0, V, (S + 2, L)), jnp.int32))


@pytest.fixture(scope="module")
def kernels():
    try:
        native.load()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["xla", "cpu"])
def body(request, monkeypatch):
    """The tests that take this run by XLA and by the C++ kernels."""
    if request.param == "cpu":
        request.getfixturevalue("kernels")
    monkeypatch.setattr(native, "loaded", lambda: request.param == "cpu")
    return request.param


@pytest.fixture
def run(body):
    return jax.jit(lambda *arguments: sampling.sample(*arguments))  # traced anew for each body


SLOTS = jnp.asarray([3, 0, 5, 1, 7, 2], jnp.int32)


def support(logits, columns, i):
    """The ids that row i may draw, by sorting."""

    def column(name):
        return np.broadcast_to(columns.get(name, NEUTRAL[name]), S)[i]

    x = logits[i].astype(np.float64) / column("temperature")
    p = np.exp(x - x.max())
    keep = p >= column("min_p") * p.max()
    order = np.argsort(-x, kind="stable")
    if 0 < column("top_k") < V:
        keep &= x >= x[order[column("top_k") - 1]]
    p = np.where(keep, p, 0) / p[keep].sum()
    if column("top_p") < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        keep &= p >= p[order[before < column("top_p")]].min()
    return set(np.flatnonzero(keep).tolist())


@pytest.mark.parametrize(
    "columns",
    [
        dict(top_k=[1, 2, 5, 0, 300, -1]),
        dict(top_p=[0.1, 0.5, 0.9, 1.0, 0.999, 1e-6]),
        dict(min_p=[0.0, 0.05, 0.5, 1.0, 0.2, 0.01]),
        dict(temperature=[0.1, 0.5, 1.0, 2.0, 5.0, 100.0], top_k=7, top_p=0.8, min_p=0.02),
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_what_is_drawn_is_the_allowed_set(run, columns):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(S, V)).astype(np.float32) * 4
    want = [support(logits, columns, i) for i in range(S)]
    seen = [set() for _ in range(S)]
    for seed in range(200):
        tokens = run(jnp.asarray(logits), row_params(**columns, seed=[[0, seed]] * S), SLOTS, state(rng))
        for i, token in enumerate(np.asarray(tokens).tolist()):
            seen[i].add(token)
    for i in range(S):
        assert seen[i] <= want[i]
        assert len(want[i]) > 6 or seen[i] == want[i], "every allowed id of a small set comes up"


def test_frequencies_follow_the_probabilities(run):
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    logits = np.concatenate([logits, np.full(V - 4, -np.inf, np.float32)])[None].repeat(S, 0)
    counts = np.zeros(V)
    for position in range(500):
        seeds = [[7, i] for i in range(S)]
        params = row_params(seed=seeds, position=position)
        counts += np.bincount(run(jnp.asarray(logits), params, SLOTS, SlotState.empty(8, L, 8, 4)), minlength=V)
    share = counts / counts.sum()
    assert np.abs(share[:4] - [0.5, 0.25, 0.125, 0.125]).max() < 0.03 and share[4:].sum() == 0


def test_a_draw_depends_on_seed_and_position_alone(run):
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.normal(size=(S, V)), jnp.float32)
    same = jnp.broadcast_to(logits[:1], (S, V))
    tokens = np.asarray(run(same, row_params(seed=[3, 4], position=5), SLOTS, state(rng)))
    assert len(set(tokens.tolist())) == 1
    moved = [
        np.asarray(run(same, row_params(seed=[3, 4], position=list(range(6))), SLOTS, state(rng))),
        np.asarray(run(same, row_params(seed=[[i, 4] for i in range(6)], position=5), SLOTS, state(rng))),
    ]
    for tokens in moved:
        assert len(set(tokens.tolist())) > 3
    mixed = run(logits, row_params(temperature=[0.0, 1.0] * 3), SLOTS, state(rng))
    assert np.asarray(mixed)[::2].tolist() == np.asarray(logits).argmax(-1)[::2].tolist()


def test_penalties_against_counts(run):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(S, V)).astype(np.float32) * 3
    columns = dict(
        repetition_penalty=[1.0, 1.5, 2.0, 0.5, 1.0, 1.0], presence_penalty=[0, 1.0, 0, -2, 0.5, 0],
        frequency_penalty=[0, 0.3, 1.5, 0, 0, 0], position=[5, 20, 39, 12, 30, 40], num_prompt=[3, 20, 9, 0, 12, 3],
        temperature=0.0,
    )  # fmt: skip
    s = state(rng)
    tokens = np.asarray(run(jnp.asarray(logits), row_params(**columns), SLOTS, s))
    for i in range(S):
        history = np.asarray(s.history)[SLOTS[i]]
        prompt, output = columns["num_prompt"][i], history[columns["num_prompt"][i] : columns["position"][i]]
        said = np.bincount(output, minlength=V)
        seen = (np.bincount(history[:prompt], minlength=V) > 0) | (said > 0)
        x, r = logits[i].copy(), columns["repetition_penalty"][i]
        x = np.where(seen, np.where(x > 0, x / r, x * r), x)
        x = x - columns["frequency_penalty"][i] * said - columns["presence_penalty"][i] * (said > 0)
        assert tokens[i] == x.argmax()


def test_bias_lists(run):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(S, V)).astype(np.float32)
    s = SlotState.empty(S + 2, L, 8, 4)
    ids = np.full((S + 2, 8), -1, np.int32)
    values = np.zeros((S + 2, 8), np.float32)
    best = logits.argmax(-1)
    ids[SLOTS[0], :2], values[SLOTS[0], :2] = [best[0], 9], [-np.inf, 50]
    ids[SLOTS[1], :2], values[SLOTS[1], :2] = [8, 200], [0, 0]
    ids[SLOTS[2], :1] = 3  # not switched on
    stops = np.full((S + 2, 4), -1, np.int32)
    stops[SLOTS[3], 2] = best[3]
    s = replace(s, bias_ids=jnp.asarray(ids), bias_values=jnp.asarray(values), stop_ids=jnp.asarray(stops))
    params = row_params(
        biased=[True, True, False, False, False, False], allow_only=[False, True, True, False, False, False],
        ban_stop=[False, False, False, True, True, False], temperature=0.0,
    )  # fmt: skip
    tokens = np.asarray(run(jnp.asarray(logits), params, SLOTS, s)).tolist()
    second = np.argsort(-logits[3])[1]
    assert tokens == [9, max((8, 200), key=lambda i: logits[1, i]), best[2], second, best[4], best[5]]


def test_logprobs_and_ranks(body):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(S, V)).astype(np.float32) * 5
    tokens = rng.integers(0, V, S).astype(np.int32)
    found = sampling.token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), 20)
    x = logits.astype(np.float64)
    want = x - np.log(np.exp(x).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.logprob, want[np.arange(S), tokens], atol=1e-5)
    order = np.argsort(-x, axis=-1)
    np.testing.assert_array_equal(found.top_ids, order[:, :20])
    np.testing.assert_allclose(found.top_logprobs, np.take_along_axis(want, order[:, :20], -1), atol=1e-5)
    np.testing.assert_array_equal(found.rank, [list(order[i]).index(tokens[i]) + 1 for i in range(S)])
    some = sampling.token_logprobs(jnp.asarray(logits), jnp.asarray(tokens).at[2].set(-1), 20)
    for got, full in zip(jax.tree.leaves(some), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(
            got, np.asarray(full).copy() * (np.arange(S) != 2).reshape(S, *[1] * (full.ndim - 1))
        )


def test_prompt_logprobs_need_no_more_memory_for_a_longer_prompt(body):
    def workspace(tokens, vocab=50_000):
        weights = jax.ShapeDtypeStruct((vocab, 8), jnp.float32)
        hidden, targets = jax.ShapeDtypeStruct((tokens, 8), jnp.float32), jax.ShapeDtypeStruct((tokens,), jnp.int32)
        run = jax.jit(lambda w, h, t: sampling.prompt_logprobs(lambda x: x @ w.T, h, t, 5))
        return run.lower(weights, hidden, targets).compile().memory_analysis().temp_size_in_bytes

    assert workspace(1024) < 1.1 * workspace(64)


def logits_of(kind, rng, rows, vocab):
    """Rows of a kind that sampling could stumble over."""
    x = rng.normal(size=(rows, vocab)) * rng.choice([0.1, 1, 5, 30], (rows, 1))
    at = rng.integers(0, vocab, rows)
    if kind == "ties":
        x = np.round(x)
    elif kind == "banned":
        x[rng.random(x.shape) < 0.5] = -np.inf
    elif kind == "equal":
        x[:] = x[:, :1]
    elif kind == "one huge":
        x[np.arange(rows), at] = 1e4
    elif kind == "no finite best":
        x[np.arange(0, rows, 4), at[::4]] = np.inf
        x[np.arange(1, rows, 4), at[1::4]] = np.nan
        x[2::4] = -np.inf
    elif kind == "ascending":
        x.sort(axis=1)
    return x.astype(np.float32)


KINDS = ["random", "ties", "banned", "equal", "one huge", "no finite best", "ascending"]
by_xla = jax.jit(sampling._choose)
by_kernel = jax.jit(sampling._choose_on_cpu)


@pytest.mark.parametrize("vocab", [1, 16, 257, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_draws_what_xla_draws(kernels, kind, vocab):
    rng = np.random.default_rng([KINDS.index(kind), vocab])
    rows = 32
    logits = logits_of(kind, rng, rows, vocab)
    choices = dict(
        temperature=[0, 1e-30, 1e-3, 0.3, 1, 1, 2, 100], top_k=[0, 0, -1, 1, 2, 50, vocab - 1, vocab, 2**31 - 1],
        top_p=[1, 1, 1e-50, 1e-6, 0.1, 0.5, 0.9, 0.99, 1 - 1e-7], min_p=[0, 0, 0, 1e-30, 0.01, 0.3, 1],
        position=[0, 1, 77, 2**31 - 1],
    )  # fmt: skip
    columns = {name: rng.choice(values, rows) for name, values in choices.items()}
    params = row_params(**columns, seed=rng.integers(0, 2**32, (rows, 2)), rows=rows)
    want, got = (np.asarray(choose(jnp.asarray(logits), params)) for choose in (by_xla, by_kernel))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_gives_xlas_logprobs(kernels, kind, monkeypatch):
    rng = np.random.default_rng(KINDS.index(kind))
    logits = logits_of(kind, rng, 8, 5000)
    tokens = rng.integers(-1, 5000, 8).astype(np.int32)
    got = sampling.token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), 20)
    monkeypatch.setattr(native, "loaded", lambda: False)
    want = sampling.token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), 20)
    np.testing.assert_allclose(got.logprob, want.logprob, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(got.top_logprobs, want.top_logprobs, rtol=1e-6, atol=1e-5)
    for i, token in enumerate(tokens):
        if token < 0 or not np.isfinite(logits[i].max()):
            assert got.rank[i] == want.rank[i] and (token >= 0 or not got.top_ids[i].any())
        else:  # by the logits: XLA ranks rounded log-probabilities, of which more are equal
            assert got.rank[i] == 1 + (logits[i] > logits[i, token]).sum()
            np.testing.assert_array_equal(got.top_ids[i], np.argsort(-logits[i], kind="stable")[:20])


def test_a_vanishing_top_p_leaves_the_best(run):
    logits = jnp.asarray(np.random.default_rng(6).normal(size=(S, V)), jnp.float32)
    tokens = run(logits, row_params(top_p=1e-50), SLOTS, SlotState.empty(S + 2, L, 8, 4))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_only_rows_of_a_positive_temperature_are_drawn_and_none_is_infinite(kernels):
    logits = jnp.zeros((S, V))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="the temperature of row 3 is infinite"):
        jax.block_until_ready(by_kernel(logits, row_params(temperature=[0, 1, 2, np.inf, 1, 1])))
    assert (np.asarray(by_kernel(logits, row_params(temperature=[0, -1, np.nan, 0, 0, 0]))) == 0).all()
