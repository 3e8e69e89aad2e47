"""Several decode steps in one launch: to the bit what one step a launch gives, and the state is changed in place."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from running_engine import Running, request
from toy_model import write_checkpoint

from jaxserve import LLM, SamplingParams, models
from jaxserve.batch import Shape, pick
from jaxserve.config import DeviceOptions, EngineOptions, ScheduleOptions, engine_options_of
from jaxserve.errors import ConfigError
from jaxserve.metrics import EngineMetrics
from jaxserve.packing import packed
from jaxserve.plans import Plan, Row
from jaxserve.runner import Runner

LLAMA = Path(__file__).parent / "goldens" / "llama2"
KINDS = (
    {},
    {"logprobs": 3},
    {"temperature": 0.9, "top_k": 20, "logprobs": 0},
    {"temperature": 1.0, "top_p": 0.9, "n": 2},
    {"temperature": 1.1, "min_p": 0.05, "presence_penalty": 0.5},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logprobs": 2},
    {"temperature": 0.8, "logit_bias": {7: 3.0, 9: -3.0}, "banned_token_ids": (11,)},
    {"temperature": 1.0, "allowed_token_ids": tuple(range(20, 60))},
    {"temperature": 1.0, "stop_token_ids": tuple(range(0, 90, 3)), "min_tokens": 4},
    {"temperature": 1.0, "eos_token_ids": tuple(range(0, 90, 4))},
    {"temperature": 1.0, "eos_token_ids": tuple(range(0, 90, 4)), "ignore_eos": True, "logprobs": 1},
    {"prompt_logprobs": 2, "logprobs": 1},
)
"""Sampling parameters of every kind that there is."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    models.ARCHITECTURES["ToyForCausalLM"] = "toy_model"
    yield write_checkpoint(tmp_path_factory.mktemp("toy"))
    del models.ARCHITECTURES["ToyForCausalLM"]


def crowd(vocab):
    """Requests of every kind, of different lengths, some with a common beginning."""
    rng = np.random.default_rng(1)
    requests = {}
    for i in range(2 * len(KINDS)):
        kind = KINDS[i % len(KINDS)]
        prompt = [*range(12)][: 6 * (i % 3)] + rng.integers(0, vocab, 1 + i % 5).tolist()
        requests[str(i)] = request(str(i), prompt, **{"max_tokens": 1 + 3 * i % 31, "seed": i} | kind)
    return requests


def watched(engine):
    """The steps of each launch from now on."""
    steps, launch = [], engine.engine.runner.launch
    engine.engine.runner.launch = lambda plan: (steps.append(plan.steps), launch(plan))[1]
    return steps


@pytest.mark.parametrize(("attention", "seqs", "pages"), [("auto", 4, 17), ("reference", 1, 64)])
def test_the_same_to_the_bit(attention, seqs, pages):
    """A pool of 17 pages is too small for four sequences: steps are cut short, and sequences preempted.

    By plain XLA a sequence's bits depend on the size of the batch, so there is one at a time.
    """
    options = {"length": 64, "pages": pages, "seqs": seqs, "attention": attention, "warmup": "lazy"}
    with Running(LLAMA, **options) as engine:
        requests = crowd(engine.engine.info.vocab_size)
        want = engine.run(requests)
        preempted = engine.metric("vllm:num_preemptions_total")
    with Running(LLAMA, decode_steps=7, **options) as engine:
        steps = watched(engine)
        got = engine.run(requests)
        engine.wait_idle()
        assert max(steps) == 7 and sum(steps) > 1.5 * len(steps)
        assert engine.metric("jaxserve_steps_total") == sum(steps)
        assert (pages == 64) == (not preempted) == (not engine.metric("vllm:num_preemptions_total"))
    assert {r.finish for r in want.values()} == {"stop", "length"}
    for key, result in want.items():
        assert replace(got[key], cached=None) == replace(result, cached=None), key


def test_a_launch_ends_with_its_sequences(toy):
    """The toy counts: what is asked for ends at a stop id, and no step is spent on it after the launch that had it."""
    with Running(toy, pages=64, length=64, decode_steps=8) as engine:
        steps = watched(engine)
        result = engine.one([1], max_tokens=60, eos_token_ids=(13,))
        assert result.tokens == [*range(2, 14)] and result.finish == "stop" and result.stop_token == 13
        # 2 comes with the prompt's step; 3 to 10; 11 to 13, and the launch that was planned before that was known
        assert steps == [1, 8, 8, 8]
        discarded = engine.metric("jaxserve_discarded_tokens_total")
        assert discarded == 0, "the device found out by itself"
        assert engine.one([1], max_tokens=9, eos_token_ids=(4,), min_tokens=5).tokens == [2, 3, 3, 3, 3, 4]
        assert engine.one([4], max_tokens=3, eos_token_ids=(4,)).tokens == [5, 6, 7], "the prompt's end is not its own"
        assert engine.one([1], max_tokens=3, eos_token_ids=(2,), ignore_eos=True).tokens == [2, 3, 4]


@pytest.fixture(scope="module", params=["auto", "reference"])
def runner(request):
    options = EngineOptions(
        schedule=ScheduleOptions(max_num_seqs=4, max_num_batched_tokens=16, decode_steps=8),
        device=DeviceOptions(block_size=4, num_kv_pages=64, warmup="lazy", attention=request.param),
    )
    return Runner(options, LLAMA, EngineMetrics("test"), lambda message: None)


@pytest.mark.parametrize("shape", [Shape(1, 1), Shape(2, 2)], ids=str)
def test_state_is_changed_in_place_in_the_loop(runner, shape):
    def compiled(**sizes):
        return runner._compile(shape, replace(runner.sizes, **sizes))

    small, big = compiled(num_pages=64), compiled(num_pages=100_000, max_num_seqs=64, max_model_len=100_000)
    cache = 2 * 100_000 * 4 * 4 * 2 * 12 * 4  # layers, pages, page, heads, k and v, head_dim, bytes
    assert big.memory_analysis().alias_size_in_bytes >= cache, "the donated cache is the result"
    grown = big.memory_analysis().temp_size_in_bytes - small.memory_analysis().temp_size_in_bytes
    assert grown < cache / 100, "a copy of the cache"
    history = 65 * 100_000 * 4
    assert grown < history / 10, "a copy of the history"
    values = f"[{2 * 100_000},4,96]"  # the cache's shape
    text = big.as_text()
    assert " while(" in text and values in text
    assert not [line for line in text.splitlines() if f"{values}" in line.split(" copy(")[0] and " copy(" in line]


def test_several_steps_are_no_more_programs(runner):
    assert len(runner.shapes) == len(set(runner.shapes)) <= 6
    one = runner.programs.step(Shape(16, 4), replace(runner.sizes, decode_steps=1))
    assert runner.programs.step(Shape(16, 4), runner.sizes).what == one.what, "steps with prompts are the same"


def test_one_step_until_a_program_of_several_is_there(runner, monkeypatch):
    assert runner.most_steps(4) == 8
    monkeypatch.setattr(runner, "shapes", (Shape(1, 1), Shape(16, 4)))
    assert [runner.most_steps(seqs) for seqs in (1, 2)] == [8, 1], "two could only go in a step for prompts"
    rows = [Row(SimpleNamespace(prompt_logprobs=None), slot, 5, 1, True) for slot in range(5)]
    known = [Shape(32, 8), Shape(64, 64)]
    assert pick(known, Plan(rows, 5, 5, [])) == Shape(32, 8)
    rows[3].steps = 4
    assert pick(known, Plan(rows, 5, 5, [])) == Shape(64, 64), "a larger one, but it is one of several steps"


def heard(add, sent, request, now):
    sent.append(request.prompt_token_ids)
    add(request, now)


def test_stop_strings_and_order_offline(monkeypatch):
    """Text ends where it does with one step a launch, and answers are in the order of the prompts."""
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_kv_pages": 64, "max_model_len": 128}
    questions = ["What is the capital of France?", "Who are you?", "What is the capital of Spain?"]
    params = SamplingParams(temperature=0, max_tokens=40, stop=("is",), logprobs=1)
    said = []
    for steps in (1, 16):
        with LLM(decode_steps=steps, **sizes) as llm:
            sent, scheduler = [], llm.engine._thread.engine.scheduler
            monkeypatch.setattr(scheduler, "add", partial(heard, scheduler.add, sent))
            outputs = llm.chat([[{"role": "user", "content": q}] for q in questions], params)
            said.append([(o.prompt_token_ids, o.outputs) for o in outputs])
            assert sent == sorted(sent) != [tuple(o.prompt_token_ids) for o in outputs], "what begins alike is together"
    assert said[0] == said[1]
    assert [o.finish_reason for _, (o,) in said[0]][0] == "stop" and said[0][0][1][0].stop_reason == "is"


@pytest.mark.parametrize(
    ("steps", "message"), [(0, "must be at least 1, got 0"), (257, "must be at most 256, got 257")]
)
def test_steps_that_cannot_be(steps, message):
    with pytest.raises(ConfigError, match=f"decode_steps {message}"):
        engine_options_of(None, {"decode_steps": steps})


def test_prompts_are_packed_by_their_beginnings_and_then_by_length():
    prompts = [(1, 2, 9), (5, 5), (1, 2, 3, 4), (7,), (1, 2, 3), (8, 8, 8)]
    assert packed(prompts, [8] * 6, 2) == [4, 2, 0, 1, 3, 5], "one length: in the order of the tokens"
    assert packed(prompts, [4, 30, 8, None, 2, 8], 2) == [3, 1, 4, 2, 0, 5]
    assert packed([], [], 16) == []
