"""Packing plans: what the device unpacks is what the plan said, and every plan finds a warmed shape."""

import random

import jax
import numpy as np
import pytest
from running_engine import request

from jaxserve import batch
from jaxserve.batch import Layout, Shape, SlotRows
from jaxserve.pages import PagePool
from jaxserve.plans import Sampled
from jaxserve.scheduler import Scheduler


@pytest.mark.parametrize(("seqs", "tokens", "least"), [(1, 1, 1), (1, 7, 2), (3, 10, 1), (64, 512, 1), (256, 2048, 8)])
def test_every_plan_has_a_shape(seqs, tokens, least):
    known = batch.shapes(seqs, tokens, least)
    assert known == sorted(set(known)) and len(known) <= 16
    largest, smallest, prompt = batch.covering(known)
    assert largest.seqs >= seqs and largest.tokens >= max(tokens, seqs) and not largest.single
    assert smallest.single and not prompt.single
    rng = random.Random(0)
    for _ in range(200):
        s = Scheduler(PagePool(400, 4), max_num_seqs=seqs, max_num_batched_tokens=max(seqs, tokens), max_model_len=1600)
        for i in range(rng.randrange(1, 2 * seqs + 1)):
            prompt = [1] * rng.choice([1, 1, 1, rng.randrange(1, 40)])
            s.add(request(str(i), prompt, max_tokens=3, prompt_logprobs=rng.choice([None, None, 0])), 0.0)
        plan = s.plan(0.0)
        shape = batch.pick(known, plan)
        assert shape.tokens >= plan.num_tokens and shape.seqs >= len(plan.rows)
        assert not shape.single or plan.num_single == len(plan.rows)
        assert batch.pick([largest], plan) == largest


def test_unpack_gives_what_was_packed():
    s = Scheduler(PagePool(40, 4), max_num_seqs=4, max_num_batched_tokens=16, max_model_len=40)
    s.add(request("a", [5, 6, 7], max_tokens=9, seed=2**40 + 3, temperature=0.5, top_k=4, top_p=0.25, min_p=0.125), 0.0)
    s.add(
        request("b", range(20, 29), max_tokens=9, seed=-1, prompt_logprobs=1, logprobs=2, min_tokens=3,
                presence_penalty=1.5, frequency_penalty=-0.5, repetition_penalty=1.25, allowed_token_ids=(3,)),
        0.0,
    )  # fmt: skip
    slots, plan = SlotRows(4, 10), s.plan(0.0)
    slots.update(plan)
    s.commit(plan, Sampled([[8], [0]]), 0.0)
    s.add(request("c", [9], max_tokens=1, seed=0), 0.0)
    s.add(request("d", range(12), max_tokens=1, seed=0, prompt_logprobs=0), 0.0)
    first = s.plan(0.0)  # b has sampled; a has 8; both continue, c and d come in
    second = s.plan(0.0)  # made before the first was committed: a's token is known to the device alone
    slots.update(first)
    slots.update(second)
    layout = Layout(Shape(16, 4), 10, 4)
    step = jax.jit(layout.unpack)(layout.pack(second, slots))
    rows = [(r.sequence.request.id, r.start, r.count) for r in second.rows]
    assert [r[0] for r in rows][:2] == ["a", "b"]
    assert np.asarray(step.tokens)[:2].tolist() == [-1, -1]
    assert np.asarray(step.kv_lens)[:2].tolist() == [r.start + r.count for r in second.rows[:2]]
    step = jax.jit(layout.unpack)(layout.pack(first, slots))
    assert np.asarray(step.tokens)[:2].tolist() == [8, 0]
    assert np.asarray(step.distribution).tolist() == [first.num_single, first.num_single, len(first.rows)]
    a, b = first.rows[0].sequence, first.rows[1].sequence
    assert np.asarray(step.page_tables[0])[0, : len(a.pages[0])].tolist() == a.pages[0]
    p = step.rows
    assert np.asarray(p.seed)[:2].tolist() == [[256, 3], [2**32 - 1, 2**32 - 1]]
    assert [float(x[0]) for x in (p.temperature, p.top_p, p.min_p)] == [0.5, 0.25, 0.125] and int(p.top_k[0]) == 4
    assert [float(x[1]) for x in (p.presence_penalty, p.frequency_penalty, p.repetition_penalty)] == [1.5, -0.5, 1.25]
    assert np.asarray(p.ban_stop).tolist()[:2] == [False, True] and np.asarray(p.allow_only).tolist()[:2] == [
        False,
        True,
    ]
    assert np.asarray(p.logprobs)[:2].tolist() == [False, True]
    assert [int(x) for x in p.num_prompt[:2]] == [3, 9] and [int(x) for x in p.position[:2]] == [4, 10]
    d = next(i for i, r in enumerate(first.rows) if r.sequence.request.id == "d")
    start = int(step.cu_q_lens[d])
    assert np.asarray(step.targets)[start : start + 3].tolist() == [1, 2, 3]
    assert (np.asarray(step.targets)[:start] == -1).all(), "nobody else asked"
    assert np.asarray(step.slots).tolist() == [r.slot for r in first.rows] and b.slot != a.slot
