"""`jaxserve bench`: offline throughput, latency of one batch, a running server, and the start until the first token."""

import asyncio
import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from cyclopts import Group, Parameter, validators

from jaxserve import bench
from jaxserve.cli import options as cli
from jaxserve.cli.opening import opened, run
from jaxserve.config import DeviceOptions, EngineOptions, ScheduleOptions, ServerOptions
from jaxserve.errors import ConfigError, EngineStopped

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]


@dataclass(frozen=True, kw_only=True)
class WorkloadFlags:
    """What is asked of the engine; by default, prompts and answers as long as vLLM's bench latency has them."""

    num_prompts: Count = 128
    """Requests in all."""
    random_input_len: Count = 32
    """Tokens of a prompt; its ids are random."""
    random_output_len: Count = 128
    """Tokens to generate; the end-of-sequence token is ignored."""
    random_range_ratio: float = 0.0
    """Lengths vary by this share up and down."""
    temperature: float = 0.0
    """Sampling temperature."""
    seed: int = 0
    """The same seed makes the same requests."""

    def workload(self, vocab_size: int) -> bench.Workload:
        return bench.Workload(
            input_len=self.random_input_len,
            output_len=self.random_output_len,
            num_prompts=self.num_prompts,
            range_ratio=self.random_range_ratio,
            vocab_size=vocab_size,
            seed=self.seed,
        )


Workload = Annotated[WorkloadFlags, Parameter(name="*", group=Group("Workload", sort_key=0))]


def throughput(
    model: cli.Model = None,
    *,
    concurrency: Annotated[tuple[Count, ...], Parameter(consume_multiple=True, negative=())] = (1, 32),
    workload: Workload = WorkloadFlags(),
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    schedule: cli.Schedule = ScheduleOptions(),
    device: cli.WarmDevice = cli.WarmDeviceFlags(),
) -> int:
    """Tokens a second of an engine in this process, without HTTP and text, at each of several concurrencies.

    Parameters
    ----------
    model
        Local directory (safetensors or Orbax), GGUF file or Hugging Face id; without it the embedded model is measured.
    concurrency
        Requests at once; several values are measured one after the other: --concurrency 1 32.
    config
        TOML file with any of these settings.
    """
    engine = cli.engine_options(model, models, schedule, device)
    return run(_throughput(engine, cli.model_name(model), concurrency, workload))


async def _throughput(engine: EngineOptions, name: str, levels: tuple[int, ...], flags: WorkloadFlags) -> int:
    reports: dict[int, bench.Report] = {}
    async with opened(engine, name) as text:
        client = text.client
        most = client.info.max_num_seqs
        if max(levels) > most:
            raise ConfigError(f"concurrency {max(levels)} exceeds max_num_seqs {most}; raise --max-num-seqs")
        send = bench.engine_target(client, flags.temperature)
        for i, level in enumerate(levels):
            work = replace(flags.workload(client.info.vocab_size), seed=flags.seed + 2 * i)
            warm = replace(work, seed=work.seed + 1, num_prompts=level, output_len=min(8, work.output_len))
            await bench.measure(send, warm.samples(), concurrency=level)
            before = await bench.engine_counters(client)
            reports[level] = await bench.measure(send, work.samples(), concurrency=level)
            after = await bench.engine_counters(client)
            print(reports[level].table(f"Throughput at concurrency {level}"))
            print(after.table(before), end="\n\n", flush=True)
    first = levels[0]
    for level in levels[1:]:
        ratio = reports[level].output_throughput / max(reports[first].output_throughput, 1e-9)
        print(bench.row(f"Output tokens/s at {level} over {first} concurrent:", ratio))
    return _failures(*reports.values())


def latency(
    model: cli.Model = None,
    *,
    batch_size: Count = 8,
    input_len: Count = 32,
    output_len: Count = 128,
    num_iters: Count = 10,
    num_iters_warmup: Annotated[int, Parameter(validator=validators.Number(gte=0))] = 2,
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    schedule: cli.Schedule = ScheduleOptions(),
    device: cli.WarmDevice = cli.WarmDeviceFlags(),
) -> int:
    """Seconds from the first prompt to the last token of one batch, again and again.

    Parameters
    ----------
    model
        Local directory (safetensors or Orbax), GGUF file or Hugging Face id; without it the embedded model is measured.
    batch_size
        Sequences in the batch.
    input_len
        Tokens of each prompt.
    output_len
        Tokens generated for each.
    num_iters
        Times that the batch is measured.
    num_iters_warmup
        Times that it is run before.
    config
        TOML file with any of these settings.
    """
    engine = cli.engine_options(model, models, schedule, device)

    async def work() -> int:
        async with opened(engine, cli.model_name(model)) as text:
            send = bench.engine_target(text.client)
            shape = bench.Workload(
                input_len=input_len,
                output_len=output_len,
                num_prompts=batch_size,
                vocab_size=text.client.info.vocab_size,
            )
            reports = [
                await bench.measure(send, replace(shape, seed=i).samples()) for i in range(num_iters_warmup + num_iters)
            ][num_iters_warmup:]
        seconds = [report.duration_s for report in reports]
        print(f"Avg latency: {np.mean(seconds):.4f} seconds")
        for percent in (10, 25, 50, 75, 90, 99):
            print(f"{percent}% percentile latency: {np.percentile(seconds, percent):.4f} seconds")
        return _failures(*reports)

    return run(work())


def serve(
    model: cli.Model = None,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    concurrency: Annotated[int | None, Parameter(alias="--max-concurrency")] = None,
    request_rate: float = math.inf,
    vocab_size: Count = 256,
    workload: Workload = WorkloadFlags(),
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    schedule: cli.Schedule = ScheduleOptions(),
    device: cli.WarmDevice = cli.WarmDeviceFlags(),
) -> int:
    """Time to first token, time per token and throughput of an OpenAI-compatible server, over HTTP.

    Parameters
    ----------
    model
        With --base-url: the model's name there (default: the first that it lists). Without: the model to serve.
    base_url
        Server to measure, http://host:port; without it one is started for the measurement.
    api_key
        Sent as a bearer token.
    concurrency
        Most requests at once; without it all at once.
    request_rate
        Requests started in a second, with random gaps; without it as fast as the concurrency lets them.
    vocab_size
        Prompts are random token ids below this.
    config
        TOML file with any of these settings.
    """
    if request_rate <= 0 or (concurrency is not None and concurrency < 1) or vocab_size < 8:
        raise ConfigError("request_rate and concurrency must be positive, and vocab_size at least 8")
    if base_url is not None and (flags := cli.as_flags(models, schedule, device)):
        raise ConfigError(f"{flags[0].split('=')[0]} is for a server started here; leave it or --base-url out")

    async def work() -> int:
        async with contextlib.AsyncExitStack() as stack:
            url = base_url
            if url is None:
                engine = cli.engine_options(model, models, schedule, device)
                url = await stack.enter_async_context(server_process(engine))
            target = bench.HttpTarget(url, model if base_url else None, api_key, workload.temperature)
            await stack.enter_async_context(target)
            work = workload.workload(vocab_size)
            print(f"measuring {await target.model()} at {url}", file=sys.stderr)
            warm = replace(work, seed=workload.seed + 1, num_prompts=min(concurrency or 4, 4), output_len=4)
            await bench.measure(target.send, warm.samples())
            report = await bench.measure(
                target.send,
                work.samples(),
                concurrency=concurrency,
                request_rate=None if math.isinf(request_rate) else request_rate,
                seed=workload.seed,
            )
        print(report.table())
        return _failures(report)

    return run(work())


def startup(
    model: cli.Model = None,
    *,
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    schedule: cli.Schedule = ScheduleOptions(),
    device: cli.Device = DeviceOptions(),
) -> int:
    """Seconds from the start of `jaxserve serve` to the first token, with an empty and a warm compile cache.

    Parameters
    ----------
    model
        Local directory (safetensors or Orbax), GGUF file or Hugging Face id; without it the embedded model is started.
    config
        TOML file with any of these settings.
    """
    if device.compile_cache_dir is not None:
        raise ConfigError("bench startup makes compile caches of its own; leave --compile-cache-dir out")

    async def first_token(cache: str) -> float:
        begun = time.perf_counter()
        engine = cli.engine_options(model, models, schedule, replace(device, compile_cache_dir=cache))
        async with server_process(engine) as url, bench.HttpTarget(url) as target:
            async with contextlib.aclosing(target.send(bench.Sample((4, 5, 6, 7), 1))) as counts:
                async for _ in counts:
                    break
        return time.perf_counter() - begun

    async def work() -> None:
        with tempfile.TemporaryDirectory() as cache:
            cold = await first_token(cache)
            print(bench.row("Start to first token, empty cache (s):", cold), flush=True)
            warm = await first_token(cache)
            print(bench.row("Start to first token, warm cache (s):", warm))

    run(work())
    return 0


@contextlib.asynccontextmanager
async def server_process(engine: EngineOptions) -> AsyncIterator[str]:
    """A `jaxserve serve` of its own on a free port; its URL, once it is ready. Raises EngineStopped if it ends."""
    # The flags say it all: what was read from variables and files is in them.
    environ = {k: v for k, v in os.environ.items() if not k.startswith(cli.ENV_PREFIX)}
    log = tempfile.TemporaryFile()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *cli.serve_words(engine, ServerOptions(port=0)),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log, env=environ,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async for line in process.stdout:
            words = line.decode().split()
            if words[:1] == ["HTTP"]:
                break
        else:
            log.seek(0)
            raise EngineStopped(f"the server ended before it was ready; it said:\n{log.read().decode().strip()}")
        drained = asyncio.create_task(process.stdout.read())  # a full pipe would stop it
        yield words[1]
        drained.cancel()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        log.close()


def _failures(*reports: bench.Report) -> int:
    """Prints what went wrong; the exit code."""
    failed = {text: count for report in reports for text, count in report.errors().items()}
    for text, count in failed.items():
        print(f"jaxserve: {count} requests failed: {text}", file=sys.stderr)
    return 1 if failed else 0
