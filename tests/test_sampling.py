"""Sampling on the device against the same rules written down plainly in numpy, with a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import sampling
from jaxserve.sampling import RowParams, SlotState

S, V, L = 6, 257, 40
NEUTRAL = dict(
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
    frequency_penalty=0.0, seed=[0, 0], position=10, num_prompt=4, biased=False, allow_only=False, ban_stop=False,
    logprobs=False,
)  # fmt: skip
DTYPES = {float: np.float32, int: np.int32, bool: np.bool_, list: np.uint32}


def row_params(**columns):
    """RowParams of S rows; a scalar is for all of them."""
    arrays = {}
    for name, default in NEUTRAL.items():
        dtype = DTYPES[type(default)]
        shape = (S, 2) if name == "seed" else (S,)
        arrays[name] = jnp.asarray(np.broadcast_to(np.asarray(columns.get(name, default), dtype), shape))
    return RowParams(**arrays)


def state(rng):
    empty = SlotState.empty(S + 2, L, 8, 4)
    return empty.replace(history=jnp.asarray(rng.integers(0, V, (S + 2, L)), jnp.int32))


run = jax.jit(sampling.sample)
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
def test_what_is_drawn_is_the_allowed_set(columns):
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


def test_frequencies_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    logits = np.concatenate([logits, np.full(V - 4, -np.inf, np.float32)])[None].repeat(S, 0)
    counts = np.zeros(V)
    for position in range(500):
        seeds = [[7, i] for i in range(S)]
        params = row_params(seed=seeds, position=position)
        counts += np.bincount(run(jnp.asarray(logits), params, SLOTS, SlotState.empty(8, L, 8, 4)), minlength=V)
    share = counts / counts.sum()
    assert np.abs(share[:4] - [0.5, 0.25, 0.125, 0.125]).max() < 0.03 and share[4:].sum() == 0


def test_a_draw_depends_on_seed_and_position_alone():
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


def test_penalties_against_counts():
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


def test_bias_lists():
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
    s = s.replace(bias_ids=jnp.asarray(ids), bias_values=jnp.asarray(values), stop_ids=jnp.asarray(stops))
    params = row_params(
        biased=[True, True, False, False, False, False], allow_only=[False, True, True, False, False, False],
        ban_stop=[False, False, False, True, True, False], temperature=0.0,
    )  # fmt: skip
    tokens = np.asarray(run(jnp.asarray(logits), params, SLOTS, s)).tolist()
    second = np.argsort(-logits[3])[1]
    assert tokens == [9, max((8, 200), key=lambda i: logits[1, i]), best[2], second, best[4], best[5]]


def test_logprobs_and_ranks():
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


def test_prompt_logprobs_need_no_more_memory_for_a_longer_prompt():
    def workspace(tokens, vocab=50_000):
        weights = jax.ShapeDtypeStruct((vocab, 8), jnp.float32)
        hidden, targets = jax.ShapeDtypeStruct((tokens, 8), jnp.float32), jax.ShapeDtypeStruct((tokens,), jnp.int32)
        run = jax.jit(lambda w, h, t: sampling.prompt_logprobs(lambda x: x @ w.T, h, t, 5))
        return run.lower(weights, hidden, targets).compile().memory_analysis().temp_size_in_bytes

    assert workspace(1024) < 1.1 * workspace(64)
