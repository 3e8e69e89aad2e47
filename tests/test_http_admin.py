"""/admin over HTTP: who may use it, what it answers; and the weights' version in every answer."""

import asyncio

import grpc
import httpx
import pytest
from fake_engine import FakeEngine
from grpc_running import running
from http_harness import application, call, chat, completion, events, http_client, in_loop, live, tokenizer_dir, until

from jaxserve.client import EngineState
from jaxserve.config import ServerOptions
from jaxserve.errors import CheckpointError, ConfigError, EngineStopped, ModelChanged
from jaxserve.request import Update
from jaxserve.server import http
from jaxserve.server.proto import jaxserve_v1_pb2 as pb
from jaxserve.server.reload import Reloader

PATH = "/admin/update_params"
VERSION = "x-jaxserve-weights-version"


@in_loop
async def test_without_a_key_there_is_no_admin() -> None:
    engine = FakeEngine()
    assert (await call(engine, "POST", PATH, {"path": "/new"})).status_code == 404
    assert not engine.updates


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer ", "Bearer", "Basic right", "right", "Bearer right x", "bearer \xe9"]
)
@in_loop
async def test_only_who_has_the_key_may(given: str | None) -> None:
    engine = FakeEngine()
    async with http_client(application(engine, admin_key="right")) as client:
        headers = {} if given is None else {b"authorization": given.encode("latin-1")}
        answer = await client.post(PATH, json={"path": "/new"}, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert not engine.updates


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel"])
def test_keys_that_no_header_could_hold_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="admin_key must be"):
        ServerOptions(admin_key=key)


@in_loop
async def test_update_params() -> None:
    engine = FakeEngine()
    async with http_client(application(engine, admin_key="right")) as client:

        async def post(**body: str | int) -> httpx.Response:
            return await client.post(PATH, json=body, headers={"Authorization": "bearer right"})

        assert (await post(path="/new")).json() == {"weights_version": 1, "load_s": 0.25, "wait_s": 0.5}
        assert (await post(path="/newer", in_flight="abort")).json()["weights_version"] == 2
        assert engine.updates == [Update(path="/new"), Update(path="/newer", in_flight="abort")]
        for body, param in (({}, "path"), ({"path": 3}, "path"), ({"path": "/", "in_flight": "keep"}, "in_flight")):
            answer = await post(**body)  # type: ignore[arg-type]
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param
        assert "ignored fields: weights" in (await post(path="/", weights="x")).headers["warnings"]
        engine.refuse = CheckpointError("missing tensor (1): model.norm")
        answer = await post(path="/new")
        assert answer.status_code == 400 and answer.json()["error"]["message"] == "missing tensor (1): model.norm"
        engine.refuse = EngineStopped("the engine died")
        assert (await post(path="/new")).status_code == 503


@in_loop
async def test_every_answer_says_its_version() -> None:
    engine = FakeEngine()
    for version in (0, 1):
        marks = set()
        for path, body in (("/v1/chat/completions", chat()), ("/v1/completions", completion(["a", "b"]))):
            whole = await call(engine, "POST", path, body)
            stream = await call(engine, "POST", path, body | {"stream": True})
            assert whole.headers[VERSION] == stream.headers[VERSION] == str(version)
            marks |= {whole.json()["system_fingerprint"]}
            marks |= {part["system_fingerprint"] for part in events(stream.text)}
        (mark,) = marks
        assert mark.endswith("-w1") == bool(version)
        models = await call(engine, "GET", "/v1/models")
        assert models.headers[VERSION] == str(version)
        assert models.json()["data"][0]["meta"]["weights_version"] == version
        await engine.update(Update())


@in_loop
async def test_an_answer_has_the_version_that_computed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of its arrival; and a stream whose headers went out before says it in its fingerprints."""
    monkeypatch.setattr(http, "FIRST_DELTA_S", 0.05)
    engine = FakeEngine()
    engine.gate = asyncio.Event()
    async with live(engine) as url, httpx.AsyncClient(base_url=url) as client:
        whole = asyncio.create_task(client.post("/v1/completions", json=completion()))
        async with client.stream("POST", "/v1/completions", json=completion(stream=True)) as stream:
            assert stream.headers[VERSION] == "0"
            await until(lambda: len(engine.running) == 2)
            await engine.update(Update())
            engine.gate.set()
            parts = events((await stream.aread()).decode())
        assert (await whole).headers[VERSION] == "1"
        assert all(part["system_fingerprint"].endswith("-w1") for part in parts)


@in_loop
async def test_who_was_cut_off_is_told_to_try_again() -> None:
    engine = FakeEngine()
    engine.fail_after = (2, ModelChanged("switched; send it again"))
    answer = await call(engine, "POST", "/v1/completions", completion())
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "model_changed"
    last = events((await call(engine, "POST", "/v1/completions", completion(stream=True))).text)[-1]
    assert last["error"]["message"] == "switched; send it again"


@in_loop
async def test_grpc_says_the_version_behind_its_answers() -> None:
    async with running(tokenizer_dir()) as r:
        await r.engine.update(Update())
        prompt = pb.Prompt(text="abc")
        calls = [
            r.api.Generate(pb.GenerateRequest(prompt=prompt)),
            r.api.Score(pb.ScoreRequest(prompt=prompt, continuations=[pb.Continuation(text="d")])),
            r.api.ListModels(pb.ListModelsRequest()),
        ]
        assert [message async for message in calls[0]]
        for one in calls:
            assert dict(await one.trailing_metadata())["jaxserve-weights-version"] == "1"
        r.engine.fail_after = (0, ModelChanged("switched"))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await r.api.Score(pb.ScoreRequest(prompt=prompt, continuations=[pb.Continuation(text="d")]))
        assert error.value.code() is grpc.StatusCode.ABORTED


@in_loop
async def test_edits_are_followed(tmp_path, caplog) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level("INFO", "jaxserve.reload")
    file, engine = tmp_path / "mine.py", FakeEngine()
    file.write_text("one")
    reloader = asyncio.create_task(Reloader(str(file)).follow(engine))
    try:
        file.touch()
        await asyncio.sleep(0.8)
        assert not engine.updates, "the same text is no edit"
        engine.refuse = ConfigError("mine.py:1: SyntaxError")
        file.unlink()
        await asyncio.sleep(0.4)
        file.write_text("two")
        await until(lambda: "code before it goes on being served: mine.py:1: SyntaxError" in caplog.text)
        engine.refuse, engine.state = None, EngineState.DEAD
        file.write_text("three")
        await asyncio.sleep(0.8)
        assert len(engine.updates) == 1, "nobody is there"
        engine.state = EngineState.READY
        await until(lambda: "switched to it after 0.8 s, weights version 1" in caplog.text)
        assert engine.updates == [Update(code=True)] * 2
    finally:
        reloader.cancel()


@pytest.mark.parametrize("code", [None, "jaxserve.models.llama"])
def test_only_files_can_be_watched(code: str | None) -> None:
    with pytest.raises(ConfigError, match="give --model-code FILE.py"):
        Reloader(code)
