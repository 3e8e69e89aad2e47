"""Opens a model for a command: finds it, starts an engine, binds its text. Ends the engine whatever happens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from jaxserve.cli.progress import progress
from jaxserve.client import EngineClient
from jaxserve.config import EngineOptions
from jaxserve.text import TextModel


def make_client(options: EngineOptions, in_process: bool) -> tuple[EngineClient, Callable[[str], TextModel]]:
    """A client of an engine that is not started yet, and what opens the model's text under a name.

    Raises ConfigError when there is no such model.
    """
    from jaxserve.hub import resolve_model

    path = resolve_model(options.model.model, options.model.revision)
    client: EngineClient
    if in_process:
        from jaxserve.client.local import LocalEngine

        client = LocalEngine(options, path)
    else:
        from jaxserve.client.remote import RemoteEngine

        client = RemoteEngine(options, path)
    return client, lambda name: TextModel.open(path, client, name)


@contextlib.asynccontextmanager
async def opened(options: EngineOptions, name: str) -> AsyncIterator[TextModel]:
    """The model's text over an engine in this process, ready to generate. Shows progress on stderr."""
    client, open_text = make_client(options, in_process=True)
    text = open_text(name)
    await client.start()
    try:
        async with progress(client):
            await client.wait_ready()
        yield text
    finally:
        # Also when the body was cancelled: a thread with work on the device must not outlive its loop.
        await asyncio.shield(asyncio.ensure_future(client.stop()))
