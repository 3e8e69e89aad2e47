"""OpenAI's own client against a real port: what it parses, counts, and raises."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest
from fake_engine import FakeEngine, ids_of
from http_harness import in_loop, live, until
from openai.types.chat import ChatCompletionMessageParam

from jaxserve.client import EngineState
from jaxserve.errors import DeadlineExceeded, Overloaded

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


@asynccontextmanager
async def sdk(engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    async with live(engine) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        yield client


def says(text: str) -> FakeEngine:
    return FakeEngine(script=lambda request, k: ids_of(text))


@in_loop
async def test_models() -> None:
    async with sdk(FakeEngine()) as client:
        assert [model.id async for model in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("fake")).owned_by == "jaxserve"


@in_loop
async def test_chat() -> None:
    async with sdk(says("Hi there")) as client:
        answer = await client.chat.completions.create(model="fake", messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "Hi there"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint


@in_loop
async def test_chat_stream_with_usage() -> None:
    async with sdk(says("Hi €")) as client:
        stream = await client.chat.completions.create(
            model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    *parts, last = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hi €"
    assert [part.choices[0].delta.role for part in parts].count("assistant") == 1
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["stop"]
    assert all(part.usage is None for part in parts)
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == len("Hi €".encode()) + 1


@in_loop
async def test_stream_helper_accumulates() -> None:
    async with sdk(says("Hi")) as client:
        async with client.chat.completions.stream(model="fake", messages=HELLO, n=2, logprobs=True) as stream:
            seen = [event.type async for event in stream]
            final = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hi", "Hi"]
    assert "content.done" in seen and "logprobs.content.delta" in seen


@in_loop
async def test_logprobs() -> None:
    async with sdk(says("Hi")) as client:
        answer = await client.chat.completions.create(
            model="fake", messages=HELLO, logprobs=True, top_logprobs=3, max_tokens=2
        )
        text = await client.completions.create(model="fake", prompt="abc", logprobs=2, max_tokens=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == "Hi"
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [3, 3]
    assert text.choices[0].logprobs is not None
    assert text.choices[0].logprobs.tokens == ["H", "i"]
    assert text.choices[0].logprobs.token_logprobs == [-0.25, -0.25]


@in_loop
async def test_n_stop_and_streams_of_completions() -> None:
    async with sdk(FakeEngine()) as client:
        answer = await client.completions.create(model="fake", prompt=["a", "k"], n=2, max_tokens=9, stop=["f", "o"])
        assert [choice.text for choice in answer.choices] == ["bcde", "cde", "lmn", "mn"]
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
        stream = await client.completions.create(model="fake", prompt="a", n=2, max_tokens=3, stream=True)
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["bcd", "cde"]


@in_loop
async def test_extra_parameters() -> None:
    engine = FakeEngine()
    async with sdk(engine) as client:
        answer = await client.completions.create(
            model="fake", prompt="a", max_tokens=2, seed=7, extra_body={"top_k": 5, "return_token_ids": True}
        )
    assert engine.requests[0].params.top_k == 5
    assert engine.requests[0].params.seed == 7
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"] == list(ids_of("bc"))


@in_loop
async def test_errors_become_the_classes_of_the_sdk() -> None:
    engine = FakeEngine()
    async with sdk(engine) as client:
        with pytest.raises(openai.BadRequestError, match="temperature") as bad:
            await client.chat.completions.create(model="fake", messages=HELLO, temperature=-1)
        assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512"):
            await client.completions.create(model="fake", prompt="a" * 600)
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="gpt-9", messages=HELLO)
        assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
        with pytest.raises(openai.BadRequestError, match="remove `tools`"):
            await client.chat.completions.create(
                model="fake", messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
            )
        engine.refuse = Overloaded("the queue is full")
        with pytest.raises(openai.InternalServerError) as full:
            await client.chat.completions.create(model="fake", messages=HELLO)
        assert full.value.status_code == 503
        assert full.value.response.headers["retry-after"] == "1"
        engine.refuse = DeadlineExceeded("too late")
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="fake", messages=HELLO, stream=True)
        engine.refuse = None
        engine.fail_after = (2, DeadlineExceeded("too late"))
        stream = await client.chat.completions.create(model="fake", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="too late"):
            async for _ in stream:
                pass
        engine.fail_after = None
        engine.state = EngineState.DEAD
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="fake", messages=HELLO)


@in_loop
async def test_raw_headers() -> None:
    async with sdk(FakeEngine()) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="fake", messages=HELLO, max_tokens=1, store=True, extra_headers={"x-request-id": "mine"}
        )
        assert raw.headers["x-request-id"] == "mine"
        assert raw.headers["warnings"] == "ignored fields: store"
        assert raw.parse().choices[0].finish_reason == "length"
        answer = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=1)
        assert answer._request_id


@in_loop
async def test_leaving_a_stream_aborts_its_work() -> None:
    engine = FakeEngine(delay_s=0.002)
    async with sdk(engine) as client:
        stream = await client.completions.create(model="fake", prompt="a", max_tokens=500, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await until(lambda: len(engine.aborted) == 1)
