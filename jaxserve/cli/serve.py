"""`jaxserve serve`: an OpenAI-compatible HTTP server and a gRPC server for one model."""

import asyncio
import json
import logging
import os
import shlex
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from jaxserve.cli import options as cli
from jaxserve.cli.opening import run, start_model
from jaxserve.client import EngineClient
from jaxserve.config import DeviceOptions, EngineOptions, HostOptions, ScheduleOptions, ServerOptions
from jaxserve.engine_process import EngineProcess
from jaxserve.host_memory import keep_objects
from jaxserve.hosts.places import check_served, place
from jaxserve.page_groups import capacity
from jaxserve.request import EngineInfo

if TYPE_CHECKING:
    from jaxserve.text import TextModel


def serve(
    model: cli.Model = None,
    *,
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    schedule: cli.Schedule = ScheduleOptions(),
    device: cli.Device = DeviceOptions(),
    hosts: cli.Hosts = HostOptions(),
    server: cli.Server = ServerOptions(),
    begun: Annotated[EngineProcess | None, Parameter(parse=False)] = None,
) -> int:
    """Serve a model over HTTP (OpenAI's API) and gRPC until SIGTERM or Ctrl-C.

    Of several hosts the first one serves; on the others the same command computes with it.

    Parameters
    ----------
    model
        Local directory (safetensors or Orbax), GGUF file or Hugging Face id (org/repo, or of GGUF files org/repo:Q4_K_M
        or org/repo/file.gguf); without it the embedded model is served.
    config
        TOML file with any of these settings, flat or in the sections [model], [schedule], [device], [hosts],
        [server].
    begun
        A process for the engine that was begun before the command line was read.
    """
    # An engine that died is started again when gRPC runs already; without this gRPC logs that it does not mind.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("uvicorn", "httpx", "jax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    engine = cli.engine_options(model, models, schedule, device)
    name = cli.model_name(model, server.served_model_name)
    here = place(hosts)
    if here is not None:
        engine = replace(engine, place=here)
        check_served(engine, server)
    follows = here is not None and here.index > 0
    if begun is not None and (follows or server.in_process):
        begun.dismiss()
    if follows:
        return run(_follow(engine, server.shutdown_timeout))
    run(_serve(engine, server, name, begun))
    return 0


async def _follow(engine: EngineOptions, drain_s: float) -> int:
    from jaxserve.client.supervise import follow
    from jaxserve.hub import resolve_model

    code = await follow(engine, resolve_model(engine.model.model, engine.model.revision), drain_s)
    for number in (signal.SIGTERM, signal.SIGINT):  # the host has ended: one more may not change how
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    return code


async def _serve(engine: EngineOptions, options: ServerOptions, name: str, begun: EngineProcess | None) -> None:
    reloader = None
    if options.reload:  # which has to know the file as it was before the engine reads it
        from jaxserve.server.reload import Reloader

        reloader = Reloader(engine.model.model_code)
    text = await start_model(engine, name, in_process=options.in_process, begun=begun)
    client = text.client
    # Only now, since the engine's process takes longer to import what it needs, and does so meanwhile.
    from jaxserve.server import serve as run_server

    addresses: asyncio.Future[tuple[str, str | None]] = asyncio.get_running_loop().create_future()

    def on_started(url: str, grpc: str | None) -> None:
        addresses.set_result((url, grpc))

    ready = asyncio.create_task(_announce(client, text, addresses))
    tasks = [ready, *([asyncio.create_task(reloader.follow(client))] if reloader else [])]
    try:
        await run_server(options, text, client, on_started)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # what ended the engine's start, run_server raised too
        await client.stop()  # when no port could be had, nobody else has


async def _announce(client: EngineClient, text: "TextModel", addresses: asyncio.Future[tuple[str, str | None]]) -> None:
    from jaxserve.cli.progress import progress

    async with progress(client):
        await client.wait_ready()
    keep_objects()
    url, grpc = await addresses
    print(ready_text(client.info, text.name, text.template is not None, url, grpc), flush=True)


def ready_text(info: EngineInfo, name: str, chat: bool, url: str, grpc: str | None) -> str:
    """What is said when requests can come: what was worked out, where to connect, and a request to paste."""
    memory = ", ".join(f"{kind} {size / 2**20:.0f} MiB" for kind, size in info.device_bytes.items())
    held = capacity(info.windows, info.num_pages, info.page_size, info.max_model_len)
    lines = [
        f"{name} is ready: {info.architecture}, {info.num_params / 1e6:.1f} M parameters, "
        f"{info.dtype} on {info.platform}",
        *([f"  devices  mesh {info.mesh}"] if info.mesh != "1x1" else []),
        f"  steps    up to {info.max_num_seqs} sequences, {info.max_num_batched_tokens} tokens, "
        f"attention {info.attention}",
        f"  context  {info.max_model_len} tokens; KV cache {held}",
        f"  memory   {memory}",
        f"  HTTP     {url}",
        f"  gRPC     {grpc or 'off'}",
        "Try it:",
        f"  {curl(url, name, chat, embeds=info.embedding is not None)}",
    ]
    return "\n".join(lines)


def curl(url: str, name: str, chat: bool, *, embeds: bool = False) -> str:
    """A shell command that asks the server something."""
    body: dict[str, Any] = {"model": name}
    if embeds:
        path = "/v1/embeddings"
        body["input"] = "What is the capital of France?"
    elif chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path = "/v1/completions"
        body |= {"prompt": "Once upon a time", "max_tokens": 64}
    return f"curl {url}{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
