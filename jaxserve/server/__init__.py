"""The server as a whole: HTTP and gRPC on one TextModel, from the open port to the drained shutdown."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn

from jaxserve.client import EngineClient
from jaxserve.config import ServerOptions, authority
from jaxserve.errors import ConfigError
from jaxserve.metrics import FrontMetrics
from jaxserve.server.grpc import GrpcServer, start_grpc
from jaxserve.server.http import HttpApp
from jaxserve.text import TextModel

LAST_WORDS_S = 5.0  # for answers to reach their clients once the engine has stopped
_IDLE_CONNECTION_S = 75

_log = logging.getLogger("jaxserve.server")


async def serve(
    options: ServerOptions,
    text_model: TextModel,
    client: EngineClient,
    on_started: Callable[[str, str | None], None],
) -> None:
    """Serves an engine that was started until SIGTERM or SIGINT; then drains it, and stops it.

    `on_started(http_url, grpc_address)` is called once the ports are open, while the engine may still be loading.
    The first signal turns health to NOT_SERVING and lets requests in flight finish for `options.shutdown_timeout`
    seconds; a second one ends them at once. Raises ConfigError if a port cannot be had, and whatever ended the
    engine's first start.
    """
    metrics = text_model.metrics
    if metrics is None:
        metrics = text_model.metrics = FrontMetrics(text_model.name)
    app = HttpApp(options, text_model, client, metrics)
    with _signals() as signals, _listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        async with contextlib.AsyncExitStack() as running:
            grpc_server = await _start_grpc(options, port, text_model, client)
            if grpc_server is not None:
                running.push_async_callback(grpc_server.stop)
            await running.enter_async_context(_http_server(app, listener))
            running.push_async_callback(client.stop)  # before the servers: answers under way end with an error
            on_started(f"http://{authority(host, port)}", None if grpc_server is None else grpc_server.address)
            await _first_of(signals.get(), _start_failure(client))
            app.draining = True
            _log.info("draining for up to %g s; a second signal ends it", options.shutdown_timeout)
            if grpc_server is not None:
                await grpc_server.drain()
            await _first_of(signals.get(), client.drain(options.shutdown_timeout))


async def _start_failure(client: EngineClient) -> None:
    """Raises what ended the engine's first start; never returns."""
    await client.wait_ready()
    await asyncio.Event().wait()


async def _first_of(*awaitables) -> None:  # type: ignore[no-untyped-def]
    """Waits for one of them, cancels the others, and raises what it raised."""
    tasks = [asyncio.ensure_future(a) for a in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Queue[int]]:
    """The SIGTERM and SIGINT that arrive. Without them outside the main thread: there, cancel the task."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[int] = asyncio.Queue()
    handled = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(number, arrived.put_nowait, number)
            handled.append(number)
    try:
        yield arrived
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError with the cure."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            cure = "give an address of this machine with --host, 127.0.0.1 or 0.0.0.0 for instance"
        elif error.errno == errno.EACCES:
            cure = "ports below 1024 need privileges; give another --port"
        else:
            cure = "is another server running? give another --port, 0 for a free one"
        raise ConfigError(f"cannot listen on {authority(host, port)} ({error.strerror}): {cure}") from error


async def _start_grpc(
    options: ServerOptions, http_port: int, text_model: TextModel, client: EngineClient
) -> GrpcServer | None:
    """gRPC on the port asked for; by default the one after HTTP's, or a free one if that is taken."""
    if options.grpc_port == -1:
        return None
    wanted = [options.grpc_port] if options.grpc_port is not None else [http_port + 1 if http_port < 65535 else 0, 0]
    for port in wanted:
        try:
            return await start_grpc(
                text_model, client, host=options.host, port=port, max_message_bytes=options.max_body_bytes
            )
        except ConfigError:
            if port == wanted[-1]:
                raise
    raise AssertionError("there is always a last port")


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers; ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _http_server(app: HttpApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serves on the listener; on leaving, answers under way get LAST_WORDS_S to end."""
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # its warnings are about clients that do not speak HTTP
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=round(LAST_WORDS_S),
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        await task
