"""The shapes of HTTP answers: golden files, logprobs, echo, token ids, what each parameter reaches the engine as."""

import json
from typing import Any

import pytest
from fake_engine import EOS, IM_END, VOCAB_SIZE, FakeEngine, ids_of
from http_harness import GOLDEN, call, chat, completion, events, in_loop
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from jaxserve.request import SamplingParams


def says(text: str) -> FakeEngine:
    return FakeEngine(script=lambda request, k: ids_of(text))


async def answer(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await call(engine, "POST", path, body)
    assert response.status_code == 200, response.text
    return response.json()


def normal(answer: Any) -> Any:
    """An answer without what differs from run to run."""
    if isinstance(answer, list):
        return [normal(part) for part in answer]
    return {**answer, "id": "ID", "created": 0, "system_fingerprint": "b0"}


@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("*.json")))
@in_loop
async def test_golden(name: str) -> None:
    """Each file holds a request, what the model says, and the answer; a stream's answer is the list of its events."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    response = await call(says(golden["model_says"]), "POST", golden["path"], golden["body"])
    assert response.status_code == 200, response.text
    streamed = golden["body"].get("stream", False)
    got: Any = events(response.text) if streamed else response.json()
    assert normal(got) == golden["answer"]
    parts: list[dict[str, Any]] = got if streamed else [got]
    for part in parts:
        assert part["id"].startswith("chatcmpl-" if "chat" in golden["path"] else "cmpl-")
        if "chat" in golden["path"]:
            (ChatCompletionChunk if streamed else ChatCompletion).model_validate(part)
        elif not streamed and not golden["body"].get("echo"):
            Completion.model_validate(part)
    if streamed:
        assert len({(part["id"], part["created"]) for part in got}) == 1


@in_loop
async def test_chat_continues_until_the_end_token() -> None:
    got = await answer(says("Paris."), "/v1/chat/completions", chat("capital?"))
    assert got["choices"][0]["message"] == {"role": "assistant", "content": "Paris.", "refusal": None}
    assert got["choices"][0]["finish_reason"] == "stop"
    assert got["usage"]["completion_tokens"] == len("Paris.") + 1  # the end token was generated too


@in_loop
async def test_several_prompts_and_n_are_numbered_prompt_first() -> None:
    got = await answer(FakeEngine(), "/v1/completions", completion(["a", "m"], n=2, max_tokens=2))
    assert [(c["index"], c["text"]) for c in got["choices"]] == [(0, "bc"), (1, "cd"), (2, "no"), (3, "op")]
    assert got["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 8,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("prompt", ["abc", ["abc"], list(ids_of("abc")), [list(ids_of("abc"))]])
@in_loop
async def test_prompt_as_text_or_ids(prompt: Any) -> None:
    got = await answer(FakeEngine(), "/v1/completions", completion(prompt, max_tokens=3))
    assert [c["text"] for c in got["choices"]] == ["def"]


@in_loop
async def test_more_prompts_than_the_engine_takes_at_once() -> None:
    engine = FakeEngine(max_num_seqs=2)
    got = await answer(engine, "/v1/completions", completion(["a"] * 7, max_tokens=1))
    assert [c["text"] for c in got["choices"]] == ["b"] * 7
    assert len({request.id for request in engine.requests}) == 7


@in_loop
async def test_scoring_computes_no_new_token() -> None:
    engine = FakeEngine()
    body = completion("abc", max_tokens=0, echo=True, logprobs=1)
    choice = (await answer(engine, "/v1/completions", body))["choices"][0]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.25, -1.25]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert engine.requests[0].params.max_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_the_chosen_token_is_always_among_the_top(stream: bool) -> None:
    body = completion("abc", max_tokens=2, echo=True, logprobs=1, stream=stream)
    response = await call(FakeEngine(), "POST", "/v1/completions", body)
    parts = events(response.text) if stream else [response.json()]
    blocks = [c["logprobs"] for part in parts for c in part["choices"] if c["logprobs"]]
    tokens = [t for block in blocks for t in block["tokens"]]
    logprobs = [t for block in blocks for t in block["token_logprobs"]]
    tops = [t for block in blocks for t in block["top_logprobs"]]
    assert "".join(tokens) == "abcde"
    assert tops[0] is None and logprobs[0] is None
    assert all(top[token] == value for token, value, top in zip(tokens[1:], logprobs[1:], tops[1:], strict=True))
    # A prompt token of this engine is never the most likely one, a sampled one always is.
    assert [value == max(top.values()) for value, top in zip(logprobs[1:], tops[1:], strict=True)] == [0, 0, 1, 1]


@in_loop
async def test_parts_of_a_character_keep_their_bytes() -> None:
    engine = says("é€")
    got = await answer(engine, "/v1/chat/completions", chat(logprobs=True, top_logprobs=1, max_tokens=5))
    content = got["choices"][0]["logprobs"]["content"]
    assert got["choices"][0]["message"]["content"] == "é€"
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == "é€"
    got = await answer(says("é€"), "/v1/completions", completion("a", logprobs=0, max_tokens=5))
    assert got["choices"][0]["logprobs"]["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert got["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 1, 1]


@in_loop
async def test_stop_string_ends_the_text_and_is_named() -> None:
    got = await answer(FakeEngine(), "/v1/completions", completion("abc", stop=["gh", "zz"], max_tokens=50))
    choice = got["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("def", "stop", "gh")


@in_loop
async def test_stop_token_is_named_even_if_it_is_number_zero() -> None:
    engine = FakeEngine(script=lambda request, k: (*ids_of("hi"), 0, *ids_of("no")))
    for stream in (False, True):
        body = completion("abc", stop_token_ids=[0], max_tokens=50, stream=stream)
        response = await call(engine, "POST", "/v1/completions", body)
        choice = (events(response.text)[-1] if stream else response.json())["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 0)


@in_loop
async def test_token_ids_on_request() -> None:
    got = await answer(FakeEngine(), "/v1/completions", completion("abc", max_tokens=2, return_token_ids=True))
    assert got["choices"][0]["prompt_token_ids"] == list(ids_of("abc"))
    assert got["choices"][0]["token_ids"] == list(ids_of("de"))
    response = await call(
        FakeEngine(), "POST", "/v1/completions", completion("abc", max_tokens=2, return_token_ids=True, stream=True)
    )
    choices = [part["choices"][0] for part in events(response.text)]
    assert [c.get("prompt_token_ids") for c in choices] == [list(ids_of("abc")), None, None]
    assert [i for c in choices for i in c["token_ids"]] == list(ids_of("de"))
    got = await answer(says("ok"), "/v1/chat/completions", chat("x", return_token_ids=True))
    assert got["prompt_token_ids"][-1] == ids_of("\n")[0]
    assert got["choices"][0]["token_ids"] == [*ids_of("ok"), EOS]
    response = await call(says("ok"), "POST", "/v1/chat/completions", chat("x", return_token_ids=True, stream=True))
    first, *rest = events(response.text)
    assert first["prompt_token_ids"] == got["prompt_token_ids"]
    assert [i for part in rest for i in part["choices"][0].get("token_ids", [])] == got["choices"][0]["token_ids"]


@in_loop
async def test_usage_on_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    engine = FakeEngine()
    engine.num_cached_tokens = 2
    response = await call(
        engine, "POST", "/v1/completions", completion("abc", max_tokens=2, stream=True, stream_options=options)
    )
    parts = events(response.text)
    assert [part["usage"]["completion_tokens"] for part in parts] == [1, 2, 2, 2]
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@in_loop
async def test_every_parameter_reaches_the_engine() -> None:
    engine = FakeEngine()
    wanted: dict[str, Any] = {
        "n": 2,
        "max_tokens": 5,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"105": -3},
        "allowed_token_ids": [104, 105, 106],
        "banned_token_ids": [107],
        "stop": "zz",
        "stop_token_ids": [9],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "seed": 42,
        "priority": 3,
        "timeout": 60,
        "cache_salt": "mine",
    }
    await answer(engine, "/v1/completions", completion("abc", **wanted, bad_words=["q"], logprobs=2, user="someone"))
    request = engine.requests[0]
    assert (request.priority, request.timeout_s, request.cache_salt) == (3, 60, "mine")
    got = {name: getattr(request.params, name) for name in SamplingParams.__struct_fields__}
    assert got.pop("banned_token_ids") == (107, ids_of("q")[0])
    assert got.pop("logit_bias") == {105: -3}
    assert got.pop("stop") in (("zz",), ())  # stop strings may end where the text lives
    assert (got.pop("logprobs"), got.pop("prompt_logprobs"), got.pop("prompt_logprobs_from")) == (2, None, 0)
    for name, value in got.items():
        assert value == (tuple(wanted[name]) if isinstance(wanted[name], list) else wanted[name]), name


@in_loop
async def test_defaults_are_the_models_own() -> None:
    engine = FakeEngine()
    await answer(engine, "/v1/completions", completion("abc"))
    await answer(engine, "/v1/chat/completions", chat("abc"))
    await answer(engine, "/v1/chat/completions", chat("abc", max_completion_tokens=3, max_tokens=9, temperature=0))
    first, second, third = (request.params for request in engine.requests)
    assert (first.temperature, first.max_tokens) == (0.7, 16)  # the model's generation_config.json; OpenAI's default
    assert (second.temperature, second.max_tokens) == (0.7, None)
    assert (third.temperature, third.max_tokens) == (0, 3)


@in_loop
async def test_null_is_absent() -> None:
    fields = ("n", "max_tokens", "stop", "seed", "stream", "logprobs", "logit_bias", "tools", "response_format")
    await answer(FakeEngine(), "/v1/chat/completions", chat("abc", **dict.fromkeys(fields)))


@in_loop
async def test_chat_template_options() -> None:
    engine = FakeEngine()
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "xy"}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 2}
    got = await answer(engine, "/v1/chat/completions", body)
    assert got["choices"][0]["message"]["content"] == "z{"  # the model goes on counting from the message's end
    assert engine.requests[0].prompt_token_ids[-1] == ids_of("y")[0]
    await answer(
        engine, "/v1/chat/completions", {**body, "continue_final_message": None, "add_generation_prompt": False}
    )
    assert engine.requests[1].prompt_token_ids[-2:] == (IM_END, ids_of("\n")[0])


@in_loop
async def test_special_tokens_in_a_message_stay_text() -> None:
    engine = FakeEngine()
    await answer(engine, "/v1/chat/completions", chat("a<|im_end|>b", max_tokens=1))
    assert engine.requests[0].prompt_token_ids.count(IM_END) == 1


@in_loop
async def test_unknown_fields_are_named() -> None:
    response = await call(FakeEngine(), "POST", "/v1/completions", completion("a", store=True, **{"näme\n": 1}))
    assert response.status_code == 200
    assert response.headers["warnings"] == "ignored fields: store, n?me?"
    body = completion("a", stream=True, stream_options={"include_obfuscation": False})
    response = await call(FakeEngine(), "POST", "/v1/completions", body)
    assert response.headers["warnings"] == "ignored fields: stream_options.include_obfuscation"
    response = await call(FakeEngine(), "POST", "/v1/completions", completion("a", **{f"x{i}": i for i in range(99)}))
    assert response.headers["warnings"].endswith(" and 89 more")
    assert "warnings" not in (await call(FakeEngine(), "POST", "/v1/completions", completion("a"))).headers


@in_loop
async def test_request_id() -> None:
    got = await answer(FakeEngine(), "/v1/completions", completion("a", request_id="mine-1"))
    assert got["id"] == "cmpl-mine-1"


@in_loop
async def test_models() -> None:
    engine = FakeEngine()
    listed = (await call(engine, "GET", "/v1/models")).json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", 512)
    assert card["meta"]["n_ctx_train"] == 4096
    assert (await call(engine, "GET", "/v1/models/fake")).json()["id"] == "fake"
    assert (await call(engine, "GET", "/v1/models/some/other")).status_code == 404


@in_loop
async def test_tokenize_in_both_shapes() -> None:
    engine = FakeEngine()

    async def ask(body: dict[str, Any], path: str = "/tokenize") -> Any:
        return await answer(engine, path, body)

    assert await ask({"prompt": "ab", "return_token_strs": True}) == {
        "count": 2,
        "max_model_len": 512,
        "tokens": list(ids_of("ab")),
        "token_strs": ["a", "b"],
    }
    assert (await ask({"prompt": "</s>", "add_special_tokens": False}))["tokens"] == [EOS]
    assert (await ask({"messages": [{"role": "user", "content": "a"}]}))["count"] > 1
    assert await ask({"content": "ab"}) == {"tokens": list(ids_of("ab"))}
    assert await ask({"content": "é", "with_pieces": True}) == {
        "tokens": [{"id": i, "piece": [b]} for i, b in zip(ids_of("é"), "é".encode(), strict=True)]
    }
    assert await ask({"tokens": [*ids_of("ab"), EOS]}, "/detokenize") == {"prompt": "ab</s>", "content": "ab</s>"}
    for path, bad in (("/tokenize", {}), ("/tokenize", {"prompt": "a", "content": "a"})):
        assert (await call(engine, "POST", path, bad)).status_code == 400
    assert (await call(engine, "POST", "/detokenize", {"tokens": [VOCAB_SIZE]})).status_code == 400
    assert (await call(engine, "POST", "/detokenize", {"tokens": [-1]})).status_code == 400


@in_loop
async def test_tokenizer_info() -> None:
    info = (await call(FakeEngine(), "GET", "/tokenizer_info")).json()
    assert (info["eos_token"], info["bos_token"]) == ("</s>", "<s>")
    assert "<|im_start|>" in info["chat_template"]


@in_loop
async def test_metrics_of_both_sides() -> None:
    response = await call(FakeEngine(), "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "fake_engine_up 1.0" in response.text
    assert "vllm:time_to_first_token_seconds" in response.text
