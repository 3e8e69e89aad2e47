"""What the HTTP tests share: the tiny model behind an application or behind a real port, and readers of answers."""

import asyncio
import contextlib
import functools
import inspect
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
from fake_engine import FakeEngine, write_tokenizer

from jaxserve.config import ServerOptions
from jaxserve.metrics import FrontMetrics
from jaxserve.server import serve
from jaxserve.server.http import HttpApp
from jaxserve.text import TextModel

GOLDEN = Path(__file__).parent / "golden_http"


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs an async test; one that hangs fails."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 120))

    assert inspect.iscoroutinefunction(test)
    return run


@functools.cache
def tokenizer_dir() -> Path:
    import tempfile

    return write_tokenizer(Path(tempfile.mkdtemp(prefix="jaxserve-test-")))


def text_model(engine: FakeEngine) -> TextModel:
    return TextModel.open(tokenizer_dir(), engine, "fake")


def application(engine: FakeEngine, **options: Any) -> HttpApp:
    model = text_model(engine)
    model.metrics = FrontMetrics("fake")
    return HttpApp(ServerOptions(**options), model, engine, model.metrics)


def http_client(app: HttpApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


async def call(engine: FakeEngine, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
    """One request to a fresh application. A body of bytes is sent as it is, any other as JSON."""
    async with http_client(application(engine, **options)) as client:
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return await client.request(method, path, content=content)


@contextlib.asynccontextmanager
async def live(engine: FakeEngine, **options: Any) -> AsyncIterator[str]:
    """The URL of a server on a free port, without gRPC."""
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = ServerOptions(**({"port": 0, "grpc_port": -1} | options))
    server = asyncio.create_task(serve(settings, text_model(engine), engine, lambda url, _: started.set_result(url)))
    await until(lambda: started.done() or server.done())
    if server.done():
        server.result()
    try:
        yield started.result()
    finally:
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)


def events(text: str) -> list[Any]:
    """The data of a stream's events, decoded; checks the framing and that [DONE] is the last."""
    assert text.endswith("\n\n")
    blocks = [block for block in text[:-2].split("\n\n") if not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


async def until(condition: Callable[[], bool]) -> None:
    """Waits until it is so; the test's own limit ends the waiting."""
    while not condition():
        await asyncio.sleep(0.005)


def chat(content: Any = "abc", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": content}]} | fields


def completion(prompt: Any = "abc", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": prompt} | fields
