"""Whatever is sent, the answer is an error object that names the fault, and never a 5xx."""

import asyncio
import base64
import json
import tarfile
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import pytest
from fake_engine import VOCAB_SIZE, FakeEngine, embeds
from http_harness import application, call, chat, completion, http_client, in_loop, live

from jaxserve import errors
from jaxserve.client import EngineState
from jaxserve.server.status import STATUS, error_body, status_of
from jaxserve.server.wire import UNSUPPORTED
from jaxserve.tokenizer.fast import FastTokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, which must be complete."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert "x-request-id" in response.headers
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error


def test_every_error_class_is_in_the_table() -> None:
    assert set(STATUS) == set(errors.error_classes().values())
    for cls, row in STATUS.items():
        assert 400 <= row.http < 600
        assert isinstance(row.grpc, grpc.StatusCode)
        assert row.grpc is not grpc.StatusCode.OK
        assert status_of(cls("x")) is row


def test_messages_of_internal_errors_stay_inside() -> None:
    for error in (ValueError("/secret"), errors.ConfigError("/secret"), errors.JaxserveError("/secret")):
        assert status_of(error).http == 500
        assert "secret" not in error_body(error).error.message


def test_a_subclass_answers_as_its_base() -> None:
    class Special(errors.PromptTooLong):
        pass

    try:
        assert status_of(Special("x")) is STATUS[errors.PromptTooLong]
    finally:
        del Special
        import gc

        gc.collect()  # error_classes() walks the living subclasses


HUGE = 10**30

WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    (TEXT, {}, "prompt"),
    (TEXT, completion(None), "prompt"),
    (TEXT, completion(""), "prompt"),
    (TEXT, completion([]), "prompt"),
    (TEXT, completion([[]]), "prompt"),
    (TEXT, completion(["a", 1]), "prompt"),
    (TEXT, completion([1.5]), "prompt[0]"),
    (TEXT, completion([["a"]]), "prompt[0][0]"),
    (TEXT, completion(["a", ["b"]]), "prompt[1][0]"),
    (TEXT, completion([-1]), "prompt"),
    (TEXT, completion([VOCAB_SIZE]), "prompt"),
    (TEXT, completion([HUGE]), "prompt"),
    (TEXT, completion({"text": "a"}), "prompt"),
    (TEXT, completion(["a"] * 2000), "prompt"),
    (TEXT, completion(["a"] * 500, n=100), "prompt"),
    (TEXT, completion(model=7), "model"),
    (TEXT, completion(n=0), "n"),
    (TEXT, completion(n=-1), "n"),
    (TEXT, completion(n=129), "n"),
    (TEXT, completion(n=HUGE), "n"),
    (TEXT, completion(n=1.5), "n"),
    (TEXT, completion(n="2"), "n"),
    (TEXT, completion(n=True), "n"),
    (TEXT, completion(max_tokens=-1), "max_tokens"),
    (TEXT, completion(max_tokens=HUGE), "max_tokens"),
    (TEXT, completion(max_tokens="many"), "max_tokens"),
    (TEXT, completion(min_tokens=17), "min_tokens"),
    (TEXT, completion(temperature=-0.1), "temperature"),
    (TEXT, completion(temperature=1e300), "temperature"),
    (TEXT, completion(temperature="hot"), "temperature"),
    (TEXT, completion(temperature=HUGE), "temperature"),
    (TEXT, completion(top_p=0), "top_p"),
    (TEXT, completion(top_p=1.1), "top_p"),
    (TEXT, completion(top_k=-2), "top_k"),
    (TEXT, completion(top_k=HUGE), "top_k"),
    (TEXT, completion(min_p=2), "min_p"),
    (TEXT, completion(repetition_penalty=0), "repetition_penalty"),
    (TEXT, completion(presence_penalty=2.1), "presence_penalty"),
    (TEXT, completion(frequency_penalty=-2.1), "frequency_penalty"),
    (TEXT, completion(logit_bias={"x": 1}), "logit_bias"),
    (TEXT, completion(logit_bias={"1": 101}), "logit_bias"),
    (TEXT, completion(logit_bias={str(VOCAB_SIZE): 1}), "logit_bias"),
    (TEXT, completion(logit_bias={"-1": 1}), "logit_bias"),
    (TEXT, completion(logit_bias=[1]), "logit_bias"),
    (TEXT, completion(allowed_token_ids=[]), "allowed_token_ids"),
    (TEXT, completion(allowed_token_ids=[VOCAB_SIZE]), "allowed_token_ids"),
    (TEXT, completion(banned_token_ids=[-1]), "banned_token_ids"),
    (TEXT, completion(bad_words=["two"]), "bad_words"),
    (TEXT, completion(bad_words=[""]), "bad_words"),
    (TEXT, completion(stop=[""]), "stop"),
    (TEXT, completion(stop=["x"] * 65), "stop"),
    (TEXT, completion(stop=[1]), "stop[0]"),
    (TEXT, completion(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
    (TEXT, completion(seed=2**64), "seed"),
    (TEXT, completion(seed=0.5), "seed"),
    (TEXT, completion(logprobs=-1), "logprobs"),
    (TEXT, completion(logprobs=21), "logprobs"),
    (TEXT, completion(logprobs=HUGE), "logprobs"),
    (TEXT, completion(stream="yes"), "stream"),
    (TEXT, completion(stream_options={"include_usage": True}), "stream_options"),
    (TEXT, completion(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
    (TEXT, completion(priority=HUGE), "priority"),
    (TEXT, completion(timeout=0), "timeout"),
    (TEXT, completion(timeout=-1), "timeout"),
    (TEXT, completion(request_id="a b"), "request_id"),
    (TEXT, completion(request_id="x" * 129), "request_id"),
    (TEXT, completion(best_of=3), "best_of"),
    (TEXT, completion(response_format={"type": "json_object"}), "response_format"),
    (TEXT, completion(response_format={"type": ["x"]}), "response_format"),
    (CHAT, {"model": "fake"}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": ["hello"]}, "messages[0]"),
    (CHAT, {"messages": [{}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": 1, "content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "a<b>", "content": "a"}]}, "messages"),
    (CHAT, chat(None), "messages[0].content"),
    (CHAT, chat(5), "messages[0].content"),
    (CHAT, chat([5]), "messages[0].content[0]"),
    (CHAT, chat([{"type": "text"}]), "messages[0].content[0].text"),
    (CHAT, chat([{"type": "image_url", "image_url": {"url": "http://x"}}]), "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "messages[0].tool_calls"),
    (CHAT, chat(max_completion_tokens=-1), "max_completion_tokens"),
    (CHAT, chat(top_logprobs=2), "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=-1), "top_logprobs"),
    (CHAT, chat(logprobs=3), "logprobs"),
    (CHAT, chat(add_generation_prompt=True, continue_final_message=True), "continue_final_message"),
    (CHAT, chat(tools=[]), "tools"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    (CHAT, chat(tool_choice="required"), "tool_choice"),
    (CHAT, chat(tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice"),
    (CHAT, chat(chat_template_kwargs={"messages": 1}), "chat_template_kwargs"),
    ("/detokenize", {}, "tokens"),
    ("/tokenize", {"prompt": 1}, "prompt"),
    ("/tokenize", {"messages": [1]}, "messages[0]"),
]


@in_loop
async def test_wrong_values_name_their_parameter() -> None:
    engine = FakeEngine()
    async with http_client(application(engine)) as client:
        for path, body, param in WRONG:
            error = check_error(await client.post(path, json=body), 400)
            assert error["param"] == param, (body, error)
            assert error["type"] == "invalid_request_error"
    assert not engine.requests


@in_loop
async def test_unsupported_fields_name_the_cure_and_neutral_values_pass() -> None:
    async with http_client(application(FakeEngine())) as client:
        for name, (neutral, cure) in UNSUPPORTED.items():
            error = check_error(await client.post(TEXT, json=completion(**{name: {"x": 1}})), 400)
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
            assert cure in error["message"]
            for value in (None, False, "", [], *neutral):
                response = await client.post(TEXT, json=completion(**{name: value}))
                assert response.status_code == 200, response.text
                assert "warnings" not in response.headers
        assert (await client.post(TEXT, json=completion(best_of=2, n=2))).status_code == 200
        assert (await client.post(CHAT, json=chat(tool_choice="none"))).status_code == 200
        assert (await client.post(CHAT, json=chat(response_format={"type": "text"}))).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nothing",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "a"} trailing',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "x": -Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "a\x00"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "n": 1, "n": 1}',
        b'{"prompt": "a", "n": 12, "n": 1, "x": 1}',
        b'{"prompt": "a", "n": ' + b"9" * 100_000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "x": ' + b'{"x":' * 100_000,
        b"[" * 1_000_000,
    ],
)
@in_loop
async def test_malformed_bodies(body: bytes) -> None:
    check_error(await call(FakeEngine(), "POST", TEXT, body), 400)


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        (TEXT, b" ", "the request body is empty; send a JSON object", None),
        (TEXT, b'\xef\xbb\xbf{"prompt": "a"}',
         "the request body begins with a byte order mark; JSON is UTF-8 without one", None),
        (TEXT, b'{"prompt": "a", "n": {"n": 1}, "\\u006e": 1}', "`n` is given more than once in the request body", "n"),
        (TEXT, b'{"prompt": "a", "top_k": 2147483648}', "top_k must be a number in [-1, 2147483647], got 2147483648",
         "top_k"),
        (TEXT, b'{"prompt": "a", "timeout": 1e9}', "timeout must be a number of seconds above 0 and below 1e9, got "
         "1000000000.0", "timeout"),
        (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": -1}',
         "max_completion_tokens must be a number in [0, 2147483647], got -1", "max_completion_tokens"),
    ],
)  # fmt: skip
@in_loop
async def test_messages_name_what_was_sent(path: str, body: bytes, message: str, param: str | None) -> None:
    error = check_error(await call(FakeEngine(), "POST", path, body), 400)
    assert (error["message"], error["param"]) == (message, param)


@in_loop
async def test_a_compressed_body_is_refused_as_such() -> None:
    async with http_client(application(FakeEngine())) as client:
        response = await client.post(TEXT, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
        assert check_error(response, 400)["message"].startswith("content-encoding 'gzip' is not supported")
        same = await client.post(TEXT, json=completion("a"), headers={"content-encoding": "identity"})
        assert same.status_code == 200


@in_loop
async def test_nesting_inside_messages() -> None:
    deep = b'{"messages": [{"role": "user", "content": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}]}"
    response = await call(FakeEngine(), "POST", CHAT, deep)
    assert response.status_code in (200, 400)


@in_loop
async def test_context_overflow() -> None:
    for path, body, param in (
        (TEXT, completion("a" * 600), "prompt"),
        (TEXT, completion("a", max_tokens=512), "prompt"),
        (CHAT, chat("a" * 600), "messages"),
        (CHAT, chat("a", max_completion_tokens=600), "messages"),
    ):
        error = check_error(await call(FakeEngine(), "POST", path, body), 400)
        assert "This model's maximum context length is 512 tokens" in error["message"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)


@in_loop
async def test_a_text_of_megabytes_is_refused_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    encode = FastTokenizer.encode

    def counted(self: FastTokenizer, text: str, **rest: Any) -> list[int]:
        read.append(len(text))
        return encode(self, text, **rest)

    monkeypatch.setattr(FastTokenizer, "encode", counted)
    long = "ab " * 1_000_000
    for engine, path, body, param in (
        (FakeEngine(), TEXT, completion(long), "prompt"),
        (FakeEngine(), CHAT, chat(long), "messages"),
        (embeds(), "/v1/embeddings", {"input": ["a", long]}, "input"),
    ):
        error = check_error(await call(engine, "POST", path, body), 400)
        assert "maximum context length is 512 tokens. However, the first 16384 of the 3000000 char" in error["message"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert read.count(16384) == 3 and max(read) == 16384


@in_loop
async def test_unknown_model() -> None:
    for path, body in ((TEXT, completion(model="gpt-9")), (CHAT, chat(model="gpt-9")), (TEXT, completion(model=""))):
        error = check_error(await call(FakeEngine(), "POST", path, body), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


@in_loop
async def test_unknown_routes_and_methods() -> None:
    engine = FakeEngine()
    for path in ("/", "/v1", "/v1/nothing", "/v1/completions/", "/%2e%2e/etc"):
        check_error(await call(engine, "GET", path), 404)
    for method, path in (("GET", TEXT), ("DELETE", CHAT), ("POST", "/health"), ("BREW", "/v1/models")):
        response = await call(engine, method, path)
        check_error(response, 405)
        assert response.headers["allow"]


@in_loop
async def test_body_too_large() -> None:
    body = json.dumps(completion("a" * 5000)).encode()
    error = check_error(await call(FakeEngine(), "POST", TEXT, body, max_body_bytes=4096), 413)
    assert error["code"] == "request_too_large"
    assert (await call(FakeEngine(max_model_len=9999), "POST", TEXT, body, max_body_bytes=8192)).status_code == 200


@pytest.mark.parametrize("header", [b"Transfer-Encoding: chunked", b"Content-Length: 1000000000000"])
@in_loop
async def test_an_endless_body_is_refused_before_its_end(header: bytes) -> None:
    async with live(FakeEngine(), max_body_bytes=4096) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")

        async def keep_sending() -> None:
            while True:
                writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0)

        sending = asyncio.create_task(keep_sending())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in head.lower()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()


@in_loop
async def test_odd_request_ids_are_replaced() -> None:
    async with http_client(application(FakeEngine())) as client:
        for given, kept in (("abc-1.2:3", True), ("a b", False), ("x" * 200, False), ("", False)):
            response = await client.get("/livez", headers={"x-request-id": given})
            assert (response.headers["x-request-id"] == given) == kept


@pytest.mark.parametrize("state", [EngineState.LOADING, EngineState.DRAINING, EngineState.DEAD])
@in_loop
async def test_while_the_engine_is_not_ready(state: EngineState) -> None:
    engine = FakeEngine(state=state)
    engine.detail = "compiling steps 3/11"
    for path, body in ((TEXT, completion()), (CHAT, chat()), (CHAT, chat(stream=True))):
        response = await call(engine, "POST", path, body)
        assert check_error(response, 503)["code"] == "engine_unavailable"
        assert int(response.headers["retry-after"]) >= 1
    for path in ("/health", "/readyz"):
        response = await call(engine, "GET", path)
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "unavailable_error"
        assert response.json()["error"]["code"] == 503
    if state is EngineState.LOADING:
        assert (await call(engine, "GET", "/health")).json()["error"]["message"].startswith("Loading model")
        check_error(await call(engine, "GET", "/v1/models"), 503)
    assert (await call(engine, "GET", "/livez")).status_code == 200
    assert (await call(engine, "GET", "/metrics")).status_code == 200


@in_loop
async def test_internal_errors_are_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.fail_after = (1, KeyError("/home/secret/file.py"))
    error = check_error(await call(engine, "POST", TEXT, completion()), 500)
    assert "secret" not in error["message"]
    assert "Traceback" in caplog.text
    assert "/home/secret/file.py" in caplog.text


def parsing_suite(data: Path) -> list[tuple[str, bytes]]:
    archive = data / "api" / "JSONTestSuite.tar.gz"
    if not archive.is_file():
        pytest.skip("no JSONTestSuite in the reference data")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.isfile() and "test_parsing/" in m.name]
        return [(Path(m.name).name, (tar.extractfile(m) or pytest.fail()).read()) for m in members]


@in_loop
async def test_json_test_suite(shared_data: Path) -> None:
    cases = parsing_suite(shared_data)
    assert len(cases) > 300
    async with http_client(application(FakeEngine())) as client:
        for name, data in cases:
            response = await client.post(TEXT, content=data)
            assert response.status_code == 400, name  # none of them is a request
            check_error(response, 400)
            response = await client.post(TEXT, content=b'{"prompt": "a", "max_tokens": 1, "x": ' + data + b"}")
            if name.startswith("n_") or response.status_code != 200:
                # A few become valid JSON by what is put around them: what matters is that nothing breaks.
                assert response.status_code in (200, 400), name
            else:
                assert response.headers["warnings"].startswith("ignored fields: x"), name


@in_loop
async def test_naughty_strings(shared_data: Path) -> None:
    api = shared_data / "api"
    if not (api / "blns.json").is_file():
        pytest.skip("no naughty strings in the reference data")
    strings = msgspec.json.decode((api / "blns.json").read_bytes(), type=list[str])
    encoded = msgspec.json.decode((api / "blns.base64.json").read_bytes(), type=list[str])
    strings += [base64.b64decode(text).decode("utf-8", "replace") for text in encoded]
    engine = FakeEngine(max_model_len=100_000)
    async with http_client(application(engine)) as client:
        for text in strings:
            for path, body in (
                (TEXT, completion(text, max_tokens=1, echo=True)),
                (CHAT, chat(text, max_tokens=1)),
                (CHAT, chat("a", max_tokens=1, user=text, stop=text or None)),
                (CHAT, {"messages": [{"role": text, "content": "a"}], "max_tokens": 1}),
                (TEXT, completion("a", model=text, **{text: text})),
                ("/tokenize", {"prompt": text, "return_token_strs": True}),
            ):
                response = await client.post(path, json=body, headers={"x-request-id": ascii(text)})
                assert response.status_code < 500, (text, response.text)
                if path == TEXT and response.status_code == 200 and body.get("echo"):
                    assert response.json()["choices"][0]["text"].startswith(text)
