"""Streams and hang-ups over a real port: framing, keep-alive, errors in the middle, work that ends with its client."""

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, ids_of
from http_harness import application, chat, completion, events, in_loop, live, until

from jaxserve.errors import DeadlineExceeded, Overloaded
from jaxserve.server import http


@in_loop
async def test_headers_and_framing() -> None:
    engine = FakeEngine()
    async with live(engine) as url, httpx.AsyncClient() as client:
        body = completion("abc", stream=True, max_tokens=3)
        response = await client.post(f"{url}/v1/completions", json=body, headers={"x-request-id": "abc-1"})
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "abc-1"
    assert "".join(part["choices"][0]["text"] for part in events(response.text)) == "def"


@in_loop
async def test_tokens_come_as_they_are_made() -> None:
    engine = FakeEngine()
    engine.steps_left = 1
    async with live(engine) as url, httpx.AsyncClient() as client:
        async with client.stream(
            "POST", f"{url}/v1/completions", json=completion(stream=True, max_tokens=3)
        ) as response:
            lines = response.aiter_lines()
            for letter in "def":
                line = await anext(lines)
                assert json.loads(line.removeprefix("data: "))["choices"][0]["text"] == letter
                assert await anext(lines) == ""
                engine.steps_left += 1


@in_loop
async def test_one_write_for_all_that_is_ready() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    body = [{"type": "http.request", "body": json.dumps(completion(n=8, stream=True, max_tokens=3)).encode()}]

    async def receive() -> dict[str, Any]:
        if body:
            return body.pop()
        await asyncio.Event().wait()
        raise AssertionError

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "client": None}
    await application(FakeEngine())(scope, receive, send)
    writes = [message["body"] for message in sent if message["type"] == "http.response.body"]
    assert len(events(b"".join(writes).decode())) == 8 * 3 + 8
    assert len(writes) <= 3 + 1  # one a step, and perhaps one for the end
    assert [message.get("more_body") for message in sent[1:]][-1] is False


@in_loop
async def test_comments_keep_a_silent_stream_alive() -> None:
    engine = FakeEngine()
    engine.steps_left = 1
    async with live(engine, sse_keep_alive_interval=0.02) as url, httpx.AsyncClient() as client:
        async with client.stream(
            "POST", f"{url}/v1/completions", json=completion(stream=True, max_tokens=4)
        ) as response:
            lines = response.aiter_lines()
            first = await anext(lines)
            comments = 0
            while comments < 3:
                comments += await anext(lines) == ": keep-alive"
            engine.steps_left = None
            rest = [line async for line in lines]
    assert first.startswith("data: ")
    assert rest[-2:] == ["data: [DONE]", ""]


@in_loop
async def test_stream_begins_without_a_first_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers do not wait for ever, and then an error can only be told in the stream."""
    monkeypatch.setattr(http, "FIRST_DELTA_S", 0.02)
    engine = FakeEngine()
    engine.gate = asyncio.Event()
    engine.fail_after = (0, Overloaded("the queue is full"))
    async with live(engine) as url, httpx.AsyncClient() as client:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=chat(stream=True)) as response:
            assert response.status_code == 200
            engine.gate.set()
            text = (await response.aread()).decode()
    assert events(text)[-1]["error"]["code"] == "overloaded"


@pytest.mark.parametrize(
    ("error", "code"),
    [(DeadlineExceeded("too late"), "deadline_exceeded"), (ValueError("a secret path"), "internal_error")],
)
@in_loop
async def test_an_error_in_the_middle_is_an_event(
    error: Exception, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    engine.fail_after = (2, error)
    async with live(engine) as url, httpx.AsyncClient() as client:
        response = await client.post(f"{url}/v1/completions", json=completion(stream=True, max_tokens=9))
    assert response.status_code == 200
    *texts, last = events(response.text)
    assert "".join(part["choices"][0]["text"] for part in texts) == "de"
    assert last["error"]["code"] == code
    assert "secret" not in response.text
    assert ("a secret path" in caplog.text) == (code == "internal_error")


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_an_error_before_the_first_token_sets_the_status(stream: bool) -> None:
    engine = FakeEngine()
    engine.refuse = Overloaded("the queue is full")
    engine.refuse.retry_after_s = 7
    async with live(engine) as url, httpx.AsyncClient() as client:
        response = await client.post(f"{url}/v1/chat/completions", json=chat(stream=stream))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_first", [False, True])
@in_loop
async def test_hanging_up_aborts_the_work(stream: bool, tokens_first: bool) -> None:
    engine = FakeEngine()
    engine.gate = asyncio.Event()
    if tokens_first:
        engine.gate.set()
        engine.delay_s = 0.01
    async with live(engine) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(completion(["abc", "xyz"], stream=stream, max_tokens=400)).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        if stream and tokens_first:
            await reader.readuntil(b"data: ")
        await until(lambda: len(engine.running) == 2)
        writer.close()
        await until(lambda: len(engine.aborted) == 2)
        assert not engine.running and not engine.finished
        async with httpx.AsyncClient() as client:
            engine.gate.set()
            response = await client.post(f"{url}/v1/completions", json=completion(max_tokens=1))
            assert response.status_code == 200


@in_loop
async def test_one_failed_prompt_aborts_the_others() -> None:
    engine = FakeEngine(delay_s=0.002)
    engine.fail_after = (5, DeadlineExceeded("too late"))
    async with live(engine) as url, httpx.AsyncClient() as client:
        response = await client.post(f"{url}/v1/completions", json=completion(["a", "b", "c"], max_tokens=100))
    assert response.status_code == 504
    assert not engine.running
    assert not engine.finished


@in_loop
async def test_many_streams_at_once() -> None:
    engine = FakeEngine(delay_s=0.001)
    async with live(engine) as url, httpx.AsyncClient(timeout=60) as client:
        letters = [chr(ord("A") + i % 20) for i in range(64)]
        bodies = [completion(letter, stream=True, max_tokens=20) for letter in letters]
        answers = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for body in bodies))
    for letter, answer in zip(letters, answers, strict=True):
        text = "".join(part["choices"][0]["text"] for part in events(answer.text))
        assert text == "".join(chr(ord(letter) + 1 + i) for i in range(20))


@in_loop
async def test_long_prompts_do_not_hold_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond some length a prompt is tokenised in a thread; the answer is the same."""
    monkeypatch.setattr(http, "SLOW_TO_ENCODE_CHARS", 10)
    engine = FakeEngine()
    async with live(engine) as url, httpx.AsyncClient() as client:
        text = "a" * 100
        await client.post(f"{url}/v1/completions", json=completion(text, max_tokens=1))
        await client.post(f"{url}/v1/chat/completions", json=chat(text, max_tokens=1))
        tokens = (await client.post(f"{url}/tokenize", json={"prompt": text})).json()["tokens"]
        long = (await client.post(f"{url}/detokenize", json={"tokens": tokens})).json()
    assert engine.requests[0].prompt_token_ids == ids_of(text)
    assert len(engine.requests[1].prompt_token_ids) > 100
    assert (tuple(tokens), long["prompt"]) == (ids_of(text), text)


@in_loop
async def test_one_access_log_line_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxserve.http")
    async with live(FakeEngine()) as url, httpx.AsyncClient() as client:
        await client.get(f"{url}/health")
        await client.get(f"{url}/metrics")
        await client.post(f"{url}/v1/completions", json=completion(max_tokens=2, user="me\nnot a line"))
        await client.get(f"{url}/a%0Ab")
        counted = (await client.get(f"{url}/metrics")).text
    lines = [record.getMessage() for record in caplog.records if record.name == "jaxserve.http"]
    assert len(lines) == 2
    assert '"POST /v1/completions" 200' in lines[0]
    assert "prompt_tokens=3 completion_tokens=2" in lines[0]
    assert not any("\n" in line for line in lines)
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="200"} 1.0' in counted
    assert 'http_requests_total{handler="none",method="GET",status="404"} 1.0' in counted
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="fake"} 1.0' in counted
