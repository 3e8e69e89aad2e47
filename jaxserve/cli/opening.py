"""Opens a model for a command: finds it, makes an engine for it, binds its text."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from jaxserve.cli.progress import progress
from jaxserve.client import EngineClient
from jaxserve.config import EngineOptions
from jaxserve.text import TextModel


def open_model(options: EngineOptions, name: str, *, in_process: bool) -> TextModel:
    """The model's text over an engine that is not started yet. Raises ConfigError when there is no such model."""
    from jaxserve.hub import resolve_model

    path = resolve_model(options.model.model, options.model.revision)
    client: EngineClient
    if in_process:
        from jaxserve.client.local import LocalEngine

        client = LocalEngine(options, path, model_name=name)
    else:
        from jaxserve.client.remote import RemoteEngine

        client = RemoteEngine(options, path, model_name=name)
    return TextModel.open(path, client, name)


@contextlib.asynccontextmanager
async def opened(options: EngineOptions, name: str) -> AsyncIterator[TextModel]:
    """The model's text over an engine in this process, ready to generate. Shows progress on stderr.

    The engine ends with the body, however that ends.
    """
    text = open_model(options, name, in_process=True)
    await text.client.start()
    try:
        async with progress(text.client):
            await text.client.wait_ready()
        yield text
    finally:
        # Also when the body was cancelled: a thread with work on the device must not outlive its loop.
        await asyncio.shield(asyncio.ensure_future(text.client.stop()))
