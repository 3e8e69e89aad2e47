"""The engine on a model that counts: every answer here was worked out by hand."""

import threading
import time

import jax
import numpy as np
import pytest
from running_engine import Running, request
from toy_model import VOCAB, expected_logits, write_checkpoint

from jaxserve import models
from jaxserve.errors import CheckpointError, ConfigError, EngineStopped, InvalidParameter


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    models.ARCHITECTURES["ToyForCausalLM"] = "toy_model"
    yield write_checkpoint(tmp_path_factory.mktemp("toy"))
    del models.ARCHITECTURES["ToyForCausalLM"]


@pytest.fixture(scope="module")
def engine(toy):
    with Running(toy, pages=64, length=64) as running:
        yield running


def log_softmax(logits):
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def test_it_counts(engine):
    result = engine.one([7, 3, 11], max_tokens=5)
    assert result.tokens == [12, 13, 14, 15, 16] and result.finish == "length"


@pytest.mark.parametrize("length", [1, 4, 5, 31, 32, 33, 60])
def test_prompts_around_every_boundary(engine, length):
    result = engine.one([*(i % 40 for i in range(length - 1)), 20], max_tokens=4)
    assert result.tokens == [21, 22, 23, 24]


def test_ends(engine):
    assert engine.one([1], max_tokens=9, eos_token_ids=(4,)).tokens == [2, 3, 4]
    assert engine.one([1], max_tokens=9, eos_token_ids=(4,)).finish == "stop"
    assert engine.one([1], max_tokens=9, stop_token_ids=(5, 3)).stop_token == 3
    assert engine.one([1], max_tokens=3, eos_token_ids=(2,), ignore_eos=True).tokens == [2, 3, 4]
    assert engine.one([1], max_tokens=0).tokens == []
    whole = engine.one([10], max_tokens=None, eos_token_ids=())
    assert len(whole.tokens) == 63 and whole.finish == "length", "up to the end of the context"
    assert whole.tokens[:3] == [11, 12, 13] and whole.tokens[-1] == VOCAB - 1


def test_min_tokens_bans_the_ends(engine):
    result = engine.one([1], max_tokens=9, eos_token_ids=(3,), stop_token_ids=(5,), min_tokens=3)
    # 2, then 3 is banned: 2 or 4 are as near, the lower id wins; from 2 again 3 is banned; then it is allowed
    assert result.tokens == [2, 2, 2, 3] and result.finish == "stop"


def test_logit_bias_allowed_and_banned_ids(engine):
    assert engine.one([1], max_tokens=3, logit_bias={9: 5.0}).tokens == [9, 9, 9]
    assert engine.one([1], max_tokens=3, logit_bias={2: -50.0}).tokens == [1, 1, 1]
    assert engine.one([1], max_tokens=3, banned_token_ids=(2, 1)).tokens == [3, 4, 5]
    assert engine.one([1], max_tokens=3, allowed_token_ids=(0, 30)).tokens == [0, 0, 0]
    assert engine.one([1], max_tokens=2, allowed_token_ids=(5, 30), logit_bias={30: 5.0, 2: 9.0}).tokens == [30, 30]
    assert engine.one([1], max_tokens=2).tokens == [2, 3], "the slot's list does not reach the next request"


def test_penalties(engine):
    # from 5: 6 is best (0.0); presence of what was said before (2.0) weighs more than any distance up to 20
    said = engine.one([5], max_tokens=4, logit_bias={5: 1.0}, presence_penalty=2.0).tokens
    assert said == [5, 6, 7, 8]
    said = engine.one([5], max_tokens=5, logit_bias={5: 1.0}, frequency_penalty=0.4).tokens
    assert said == [5, 5, 5, 6, 7]  # 5 weighs 0.9, and 0.4 less each time that it was said: 0.5, 0.1, -0.3; 6 weighs 0
    # after the bias, repetition divides what is above zero and multiplies what is below; the prompt's tokens count
    assert engine.one([5, 6, 5], max_tokens=1, logit_bias={6: 1.0, 9: 0.9}).tokens == [6]
    assert engine.one([5, 6, 5], max_tokens=1, logit_bias={6: 1.0, 9: 0.9}, repetition_penalty=2.0).tokens == [9]


def test_penalties_see_a_cached_prompt(engine):
    prompt = [6, *range(20, 40), 5]
    first = engine.one(prompt, max_tokens=1, logit_bias={6: 1.0, 9: 0.9}, repetition_penalty=2.0)
    again = engine.one(prompt, max_tokens=1, logit_bias={6: 1.0, 9: 0.9}, repetition_penalty=2.0)
    assert again.cached == 20 and first.tokens == again.tokens == [9]


def test_logprobs_are_the_raw_models(engine):
    result = engine.one([5], max_tokens=2, logprobs=3, logit_bias={9: 50.0})
    want = log_softmax(expected_logits(5))
    assert result.tokens == [9, 9]
    assert result.logprobs[0].logprob == pytest.approx(want[9], abs=1e-5)
    assert result.logprobs[0].rank == 6, "6, 5 and 7, 4 and 8 come before; 3 and 9 are even"
    assert result.logprobs[0].top_ids == (6, 5, 7)
    assert result.logprobs[0].top_logprobs == pytest.approx(want[[6, 5, 7]], abs=1e-5)
    assert engine.one([5], max_tokens=2).logprobs == []


@pytest.mark.parametrize("length", [2, 5, 32, 50])
def test_prompt_logprobs(engine, length):
    prompt = [int(i) for i in np.random.default_rng(length).integers(0, VOCAB, length)]
    result = engine.one(prompt, max_tokens=1, prompt_logprobs=2)
    assert len(result.prompt_logprobs) == length and result.prompt_logprobs[0] is None
    for before, token, got in zip(prompt[:-1], prompt[1:], result.prompt_logprobs[1:], strict=True):
        want = log_softmax(expected_logits(before))
        assert got.logprob == pytest.approx(want[token], abs=1e-5)
        assert got.top_ids[0] == min(before + 1, VOCAB - 1)
    assert engine.one(prompt, max_tokens=0, prompt_logprobs=2).prompt_logprobs == result.prompt_logprobs


def test_seeds(engine):
    def draw(**params):
        return engine.one([20], max_tokens=12, temperature=1.0, **params).tokens

    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2) != draw(seed=-2)
    assert draw(seed=2**63 + 1) != draw(seed=1), "all 64 bits count"
    assert draw() != draw(), "without a seed every request has its own"
    together = engine.run({"n": request("n", [20], max_tokens=12, temperature=1.0, seed=5, n=4)})
    assert [together["n", i].tokens for i in range(4)] == [draw(seed=5 + i) for i in range(4)]


def test_top_k_top_p_min_p_limit_what_is_drawn(engine):
    def seen(**params):
        requests = {str(s): request(str(s), [20], max_tokens=1, temperature=1.0, seed=s, **params) for s in range(60)}
        return {r.tokens[0] for r in engine.run(requests).values()}

    assert seen(top_k=1) == {21}
    assert seen(top_k=3) == {20, 21, 22}
    assert seen(min_p=0.85) == {20, 21, 22}, "exp(-0.1) = 0.905, exp(-0.2) = 0.819"
    probabilities = np.exp(log_softmax(expected_logits(20)))
    assert seen(top_p=float(probabilities[21]) - 1e-3) == {21}
    assert len(seen()) > 10


def test_prefix_hits_and_salt(engine):
    prompt = list(range(30))
    assert engine.one(prompt, max_tokens=1, cache_salt="x").cached == 0
    assert engine.one(prompt, max_tokens=1, cache_salt="x").cached == 28
    assert engine.one(prompt, max_tokens=1, cache_salt="y").cached == 0
    assert engine.one(prompt, max_tokens=3, cache_salt="x").tokens == [30, 31, 32]


@pytest.mark.parametrize(("seqs", "pages"), [(8, 24), (64, 240)])
def test_a_crowd_is_everyone_alone(toy, monkeypatch, seqs, pages):
    """Mixed lengths, temperatures, seeds and prefix hits in a pool so small that sequences are preempted."""
    rng = np.random.default_rng(0)
    prefixes = [list(range(24)), [3] * 17]
    requests = {}
    for i in range(64):
        prompt = [*prefixes[i % 2][: rng.integers(0, 24)], *rng.integers(0, VOCAB, rng.integers(1, 12)).tolist()]
        requests[str(i)] = request(
            str(i), prompt, max_tokens=int(rng.integers(1, 30)), temperature=float(rng.choice([0.0, 0.7, 1.5])),
            seed=int(rng.integers(0, 2**31)), top_k=int(rng.choice([0, 5])), top_p=float(rng.choice([1.0, 0.9])),
            repetition_penalty=float(rng.choice([1.0, 1.0, 1.3])), logprobs=[None, 2][i % 2], n=[1, 1, 1, 2][i % 4],
        )  # fmt: skip
    with Running(toy, pages=pages, length=64, seqs=seqs, budget=max(32, 2 * seqs)) as crowd:
        compiled, together_in_a_step = [], []
        launch = crowd.engine.runner.launch
        monkeypatch.setattr(
            crowd.engine.runner, "launch", lambda plan: (together_in_a_step.append(len(plan.rows)), launch(plan))[1]
        )
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, duration, **kwargs: compiled.append(event) if "backend_compile" in event else None
        )
        together = crowd.run(requests)
        assert not compiled, "nothing is compiled after warm-up, whatever the counter says"
        jax.jit(lambda x: x * 3)(1.0)
        assert compiled, "the listener hears"
        assert max(together_in_a_step) > 0.7 * seqs, "a crowd, not a queue"
        assert crowd.metric("vllm:num_preemptions_total") > 0
        assert crowd.metric("vllm:num_preemptions_total") == crowd.metric("vllm:request_num_preemptions_sum")
        assert crowd.metric("vllm:prefix_cache_hits_total") > 0
        assert crowd.programs("serving") == 0
        assert crowd.programs("warmup") == len(crowd.engine.runner.shapes) + 2, "the state and its binding, too"
        alone = {}
        for name in requests:
            alone |= crowd.run({name: requests[name]})
        crowd.wait_idle()
    for key in together:
        assert together[key].tokens == alone[key].tokens, key
        assert [p.logprob for p in together[key].logprobs] == pytest.approx([p.logprob for p in alone[key].logprobs])


@pytest.mark.parametrize("warmup", ["min", "lazy"])
def test_other_warm_ups_give_the_same_tokens(toy, warmup):
    with Running(toy, pages=64, length=64, warmup=warmup) as running:
        assert running.one(range(20), max_tokens=5).tokens == [20, 21, 22, 23, 24]
        serving = running.programs("serving")
        assert (serving == 0) == (warmup == "min")


def test_abort_frees_pages_while_others_go_on(engine):
    engine.thread.submit(request("gone", [1], max_tokens=60))
    engine.thread.abort("gone")
    engine.thread.submit(request("gone too", range(40), max_tokens=20))
    results = engine.run({"stays": request("stays", [1], max_tokens=30)})
    assert len(results["stays", 0].tokens) == 30
    engine.thread.abort("gone too")
    engine.wait_idle()


def test_an_aborted_request_is_in_no_later_step(engine, monkeypatch):
    """Its pages are free when the next step is planned, while the step that computes it is still running."""
    steps, held = [], []
    launch, scheduler = engine.engine.runner.launch, engine.engine.scheduler

    def watch(plan):
        steps.append({row.sequence.request.id for row in plan.rows})
        held.append(scheduler.pages.num_pages - scheduler.pages.available)
        if len(steps) == 3:
            engine.engine.abort("gone")
        return launch(plan)

    monkeypatch.setattr(engine.engine.runner, "launch", watch)
    engine.thread.submit(request("gone", [1] * 21, max_tokens=40))
    results = engine.run({"stays": request("stays", [2], max_tokens=30)})
    assert len(results["stays", 0].tokens) == 30
    assert "gone" in steps[2] and not any("gone" in step for step in steps[3:])
    assert held[2] >= 7 and held[3] <= 2


def test_prompt_tokens_are_counted_by_their_source(toy):
    with Running(toy, pages=16, length=64) as running:
        for _ in range(2):
            running.one(range(10), max_tokens=1)
        source = {
            s: running.metric("vllm:prompt_tokens_by_source_total", source=s)
            for s in ("local_compute", "local_cache_hit")
        }
        assert source == {"local_compute": 10 + 2, "local_cache_hit": 8}
        waiting = [running.metric("vllm:num_requests_waiting_by_reason", reason=r) for r in ("capacity", "deferred")]
        assert waiting == [0, 0]


def test_refusals_reach_the_sender_alone(engine):
    requests = {
        "good": request("good", [1], max_tokens=20),
        "vocab": request("vocab", [VOCAB], max_tokens=2),
        "empty": request("empty", [], max_tokens=2),
        "long": request("long", range(40), max_tokens=25, n=2),
        "bias": request("bias", [1], logit_bias={VOCAB: 1.0}),
        "timeout": request("timeout", [1], timeout_s=-1.0),
        "priority": request("priority", [1], priority=3),
    }
    results = engine.run(requests)
    assert results["good", 0].tokens == [*range(2, 22)]
    assert results["vocab", 0].error == results["empty", 0].error == results["bias", 0].error == "InvalidParameter"
    assert results["long", 0].error == results["long", 1].error == "PromptTooLong"
    assert results["timeout", 0].error == "InvalidParameter"
    assert results["priority", 0].error == "UnsupportedParameter", "this engine goes by arrival"


def test_values_at_the_edge_of_float32(engine):
    for params in (dict(temperature=1e-40), dict(temperature=1e-3), dict(temperature=1.0, top_p=1e-40)):
        assert engine.one([7], max_tokens=3, seed=1, **params).tokens == [8, 9, 10], params


def test_as_many_biased_ids_as_are_allowed(engine):
    allowed = tuple(range(VOCAB))
    assert engine.one([7], max_tokens=2, allowed_token_ids=allowed, banned_token_ids=(8,)).tokens == [7, 7]
    wide = {i: 0.0 for i in range(1000)}
    with pytest.raises(InvalidParameter, match="2000 ids together"):
        request("x", [7], logit_bias=wide, banned_token_ids=tuple(range(1000, 2000)))
    with pytest.raises(InvalidParameter, match="is banned"):
        request("x", [7], allowed_token_ids=(3, 4), banned_token_ids=(4, 3))
    refused = engine.one([7], allowed_token_ids=(3,), stop_token_ids=(3,), min_tokens=2)
    assert refused.error == "InvalidParameter"


@pytest.mark.parametrize(
    "name", ["n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "prompt_logprobs_from"]
)
def test_what_must_be_whole_is(name):
    for value in (1.5, 1.0, "1", True):
        with pytest.raises(InvalidParameter, match=f"{name} must be an integer"):
            request("x", [1], **{name: value})


def test_deadlines_and_a_full_queue(toy):
    with Running(toy, pages=64, length=64, seqs=1, max_queued_requests=1) as running:
        requests = {
            "late": request("late", [1], max_tokens=60, timeout_s=1e-4),
            **{str(i): request(str(i), [1], max_tokens=30) for i in range(8)},
        }
        results = running.run(requests)
        assert results["late", 0].error == "DeadlineExceeded"
        assert {r.error for r in results.values()} >= {"Overloaded", "DeadlineExceeded"}
        assert running.metric("vllm:admission_rejections_total", reason="queue_full") > 0
        assert running.one([1], max_tokens=3).tokens == [2, 3, 4]
        running.wait_idle()


def test_priorities(toy):
    with Running(toy, pages=64, length=64, seqs=1, scheduling_policy="priority") as running:
        order = []
        running.thread.submit(request("running", [1], max_tokens=50))
        while not running.engine.scheduler.running:
            time.sleep(0.001)
        running.thread.submit(request("low", [1], max_tokens=1, priority=1))
        running.thread.submit(request("high", [1], max_tokens=1, priority=-1))
        while len(order) < 3:
            order += [d.request_id for d in running._deltas.get(timeout=60) if d.finish]
        assert order == ["running", "high", "low"]


def test_a_failing_step_ends_everything_with_an_error(toy, monkeypatch):
    hooks = []
    monkeypatch.setattr(threading, "excepthook", hooks.append)
    with Running(toy, pages=64, length=64) as running:
        monkeypatch.setattr(running.engine.runner, "launch", lambda plan: 1 / 0)
        results = running.run({"a": request("a", [1], max_tokens=3, n=2)})
        assert [r.error for r in results.values()] == ["EngineStopped"] * 2
        for _ in range(500):
            if running.thread.status.state == "dead":
                break
            time.sleep(0.01)
        with pytest.raises(EngineStopped, match="ZeroDivisionError"):
            running.thread.submit(request("b", [1]))
        assert hooks, "the traceback is shown"


def test_stop_tells_those_in_flight(toy):
    with Running(toy, pages=64, length=64) as running:
        running.thread.submit(request("a", [1], max_tokens=60))
        running.thread.stop()
        deltas = []
        while not running._deltas.empty():
            deltas += running._deltas.get()
        last = deltas[-1]
        assert last.finish in ("error", "length") and (last.finish == "length" or last.error.kind == "EngineStopped")


def test_sizes_that_cannot_be(toy):
    for options, message in (
        (dict(pages=4, length=64), "max_model_len 64 needs 16 pages"),
        (dict(length=1000), "exceeds the model's 128 positions"),
        (dict(seqs=8, budget=7), "max_num_batched_tokens 7 is less than max_num_seqs 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            Running(toy, **options).__enter__()
    with Running(toy, pages=5, warmup="lazy") as running:
        assert running.engine.info.max_model_len == 20, "lowered to what fits"


def test_a_checkpoint_that_does_not_fit(toy, tmp_path):
    (write_checkpoint(tmp_path / "broken") / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError):
        Running(tmp_path / "broken").__enter__()
