"""Layers with windows keep only those in the engine, and nobody notices: the answers are those of an engine that keeps
every page."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from running_engine import Running, request

from jaxserve import profile
from jaxserve.batch import Layout, Shape
from jaxserve.errors import ConfigError
from jaxserve.page_groups import PageGroups
from jaxserve.spec import CacheSpec

GOLDENS = Path(__file__).parent / "goldens"
POOLS = {"gemma2": 58, "gemma3": 100, "mistral": 14}
"""Pages with which some sequence is preempted, and the longest one fits."""
GROUPS = {"gemma2": (None, 8, 8), "gemma3": (None, *[9] * 6), "mistral": (9,)}
PAGE = 4


def requests():
    """Prompts of up to twenty windows, in chunks of up to 32 tokens; some begin alike, one has two continuations."""
    rng = np.random.default_rng(1)
    first = rng.integers(3, 160, 180).tolist()
    own = {
        "short": first[:5], "long": first[:170], "again": first[:150], "branch": [*first[:41], *range(3, 60)],
        "two": rng.integers(3, 160, 70).tolist(),
    }  # fmt: skip
    return {
        name: request(name, prompt, max_tokens=30, logprobs=1, n=2 if name == "two" else 1, temperature=0.5, seed=3)
        for name, prompt in own.items()
    }


def engine(name, **options):
    defaults = {"page": PAGE, "seqs": 4, "budget": 32, "warmup": "lazy", "attention": "reference"}
    return Running(GOLDENS / name, **defaults | options)


def answers(engine, one_by_one=False):
    """Of one compiled shape, so that rounding is the same."""
    runner = engine.engine.runner
    runner.shapes = (max(runner.shapes),)
    asked = requests()
    if not one_by_one:
        return engine.run(asked)
    return {key: result for name in asked for key, result in engine.run({name: asked[name]}).items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, result in want.items():
        assert got[key].tokens == result.tokens, key
        np.testing.assert_allclose(
            [p.logprob for p in got[key].logprobs], [p.logprob for p in result.logprobs], atol=1e-5
        )


@pytest.fixture(scope="module")
def without_groups():
    """By model and type of cache: the answers of an engine whose layers keep everything."""
    known = {}

    def of(name, cache="auto"):
        if (name, cache) not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(CacheSpec, "groups", lambda spec, length: PageGroups.single(spec.layers))
                with engine(name, pages=400, cache=cache, enable_prefix_caching=False) as running:
                    assert running.engine.info.windows == (None,)
                    known[name, cache] = answers(running, one_by_one=True)
        return known[name, cache]

    return of


@pytest.mark.parametrize("name", GROUPS)
def test_a_crowd_answers_as_if_every_page_were_kept(without_groups, name):
    """Chunks, prefix hits, and a pool so small that sequences are preempted."""
    with engine(name, pages=POOLS[name]) as running:
        assert running.engine.info.windows == GROUPS[name] and running.engine.info.max_model_len >= 200
        assert_same(answers(running), without_groups(name))
        again = running.one(requests()["long"].prompt_token_ids, max_tokens=30, temperature=0.5, seed=3, logprobs=1)
        assert_same({("long", 0): again}, {("long", 0): without_groups(name)["long", 0]})
        assert running.metric("vllm:num_preemptions_total") > 0
        assert running.metric("vllm:prefix_cache_hits_total") > 0
        running.wait_idle()
        assert running.metric("vllm:kv_cache_usage_perc") == 0


def test_a_cache_of_bytes_has_groups_too(without_groups):
    with engine("gemma2", pages=400, cache="int8") as running:
        assert running.engine.info.windows == GROUPS["gemma2"]
        assert_same(answers(running), without_groups("gemma2", "int8"))
        with pytest.raises(ConfigError, match="pages of KV cache needed: 248 exceeds num_kv_pages 200"):
            profile.Case(4, 1, 220).plan(
                SimpleNamespace(sizes=replace(running.engine.runner.sizes, num_pages=200), info=running.engine.info)
            )
        timing = profile.measure(running.engine.runner, profile.Case(4, 1, 220), steps=1, warm=0)
        assert timing.shape.tokens == 32, "a step of `jaxserve bench step` has groups, too"


def test_with_the_cpus_kernels_no_bit_differs(compiler, monkeypatch):
    with engine("gemma2", pages=100, page=16, attention="cpu") as running:
        got = answers(running)
    monkeypatch.setattr(CacheSpec, "groups", lambda spec, length: PageGroups.single(spec.layers))
    with engine("gemma2", pages=100, page=16, attention="cpu") as running:
        want = answers(running)
    assert {k: (r.tokens, r.logprobs) for k, r in got.items()} == {k: (r.tokens, r.logprobs) for k, r in want.items()}


def test_the_same_bytes_hold_longer_contexts(monkeypatch):
    with engine("gemma3", pages=7 * 20) as running:
        info = running.engine.info
        assert info.max_model_len == 256, "64 pages for the layer that sees all, and 3 for each of six that see 9"
    monkeypatch.setattr(CacheSpec, "groups", lambda spec, length: PageGroups.single(spec.layers))
    with engine("gemma3", pages=20) as running:
        assert running.engine.info.device_bytes["kv"] == info.device_bytes["kv"]
        assert running.engine.info.max_model_len == 80, "20 pages for all seven"


def test_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match=r"max_model_len 200 needs 68 pages of KV cache and 60 fit"):
        engine("gemma3", pages=60, length=200).__enter__()
    with pytest.raises(ConfigError, match=r"max_model_len 1 needs 7 pages of KV cache and 6 fit"):
        engine("gemma3", pages=6).__enter__()


def test_one_group_costs_nothing():
    """What a step is given of a model without windows, or with nothing else, is one page table and no more."""
    plain = Layout(Shape(16, 4), 64, 4)
    assert Layout(Shape(16, 4), 64, 4, (9,), PAGE).size == plain.size
    grouped = Layout(Shape(4, 4), 1000, 4, (None, 9, 9), PAGE).size - Layout(Shape(4, 4), 1000, 4).size
    assert grouped == 2 * (4 * 34 + 4), "of the others only what 9 tokens can lie in, and where that begins"
