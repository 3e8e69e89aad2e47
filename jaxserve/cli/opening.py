"""Opens a model for a command: finds it, makes an engine for it, binds its text; and the event loop for it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.client import EngineClient
from jaxserve.config import EngineOptions
from jaxserve.engine_process import EngineProcess
from jaxserve.host_memory import keep_objects

if TYPE_CHECKING:
    from jaxserve.text import TextModel


def run[Result](main: Coroutine[Any, Any, Result]) -> Result:
    """asyncio.run on uvloop, which does the same in half the time."""
    try:
        from uvloop import new_event_loop
    except ImportError:  # there is none for Windows
        return asyncio.run(main)
    return asyncio.run(main, loop_factory=new_event_loop)


async def start_model(
    options: EngineOptions, name: str, *, in_process: bool, begun: EngineProcess | None = None
) -> "TextModel":
    """The model's text over an engine that is loading meanwhile, in the process `begun` if there is one already.

    Raises ConfigError when there is no such model or its text cannot be had, CheckpointError for a broken .gguf file;
    the engine is stopped then.
    """
    from jaxserve.hub import resolve_model

    path = resolve_model(options.model.model, options.model.revision)
    client: EngineClient
    if in_process:
        from jaxserve.client.local import LocalEngine

        client = LocalEngine(options, path, model_name=name)
    else:
        from jaxserve.client.remote import RemoteEngine

        client = RemoteEngine(options, path, model_name=name, begun=begun)
    await client.start()
    try:
        return await asyncio.to_thread(_open_text, path, client, name)  # a large vocabulary takes a second
    except BaseException:
        await client.stop()
        raise


def _open_text(path: Path, client: EngineClient, name: str) -> "TextModel":
    from jaxserve.text import TextModel  # here, since the engine's process is starting meanwhile

    return TextModel.open(path, client, name)


@contextlib.asynccontextmanager
async def opened(options: EngineOptions, name: str, *, in_process: bool = True) -> AsyncIterator["TextModel"]:
    """The model's text over an engine, in this process or one of its own, ready to generate. Shows progress on stderr.

    The engine ends with the body, however that ends.
    """
    text = await start_model(options, name, in_process=in_process)
    try:
        from jaxserve.cli.progress import progress

        async with progress(text.client):
            await text.client.wait_ready()
        keep_objects()
        yield text
    finally:
        # Also when the body was cancelled: a thread with work on the device must not outlive its loop.
        await asyncio.shield(asyncio.ensure_future(text.client.stop()))
