"""Measures a load: made-up requests, a target that answers them, and the table of vLLM's bench. Prints nothing."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.client import EngineClient
from jaxserve.config import authority
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.request import Request, SamplingParams


@dataclass(frozen=True)
class Sample:
    """One made-up request: its prompt, and how many tokens it must generate."""

    prompt_token_ids: tuple[int, ...]
    output_tokens: int


type Send = Callable[[Sample], AsyncIterator[int]]
"""Sends a request; yields how many tokens have come, each time that some come. Raises JaxserveError."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Which requests are made up. Lengths are in tokens; with `range_ratio` r they vary in [(1-r) len, (1+r) len]."""

    input_len: int = 64
    output_len: int = 64
    num_prompts: int = 128
    range_ratio: float = 0.0
    vocab_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"range_ratio must be in [0, 1), got {self.range_ratio}")

    def samples(self) -> list[Sample]:
        """The same requests for the same workload, no two with a common beginning worth caching."""
        rng = np.random.default_rng(self.seed)

        def lengths(mean: int) -> list[int]:
            low, high = round(mean * (1 - self.range_ratio)), round(mean * (1 + self.range_ratio))
            return [int(n) for n in rng.integers(max(low, 1), max(high, 1), self.num_prompts, endpoint=True)]

        # Ids below 4 are the specials of most vocabularies.
        return [
            Sample(tuple(int(t) for t in rng.integers(4, self.vocab_size, prompt)), output)
            for prompt, output in zip(lengths(self.input_len), lengths(self.output_len), strict=True)
        ]


@dataclass
class Outcome:
    """What became of one request. Times in seconds."""

    prompt_tokens: int
    tokens: int = 0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Report:
    """A measured load."""

    outcomes: tuple[Outcome, ...]
    duration_s: float
    concurrency: int | None
    peak_concurrent: int

    @property
    def done(self) -> tuple[Outcome, ...]:
        """The requests that were answered."""
        return tuple(o for o in self.outcomes if not o.error)

    @property
    def output_throughput(self) -> float:
        """Generated tokens a second, all requests together."""
        return sum(o.tokens for o in self.done) / self.duration_s

    def table(self, title: str = "Serving Benchmark Result") -> str:
        """The labels and the layout of vLLM's bench, so that scripts which read those work."""
        done = self.done
        inputs, outputs = sum(o.prompt_tokens for o in done), sum(o.tokens for o in done)
        rows: list[tuple[str, int | float | None]] = [
            ("Successful requests:", len(done)),
            ("Failed requests:", len(self.outcomes) - len(done)),
            ("Maximum request concurrency:", self.concurrency),
            ("Benchmark duration (s):", self.duration_s),
            ("Total input tokens:", inputs),
            ("Total generated tokens:", outputs),
            ("Request throughput (req/s):", len(done) / self.duration_s),
            ("Output token throughput (tok/s):", self.output_throughput),
            ("Peak concurrent requests:", self.peak_concurrent),
            ("Total token throughput (tok/s):", (inputs + outputs) / self.duration_s),
        ]
        lines = [f"{f' {title} ':=^50}", *(row(label, value) for label, value in rows if value is not None)]
        for heading, name, seconds in (
            ("Time to First Token", "TTFT", [o.ttft_s for o in done]),
            (
                "Time per Output Token (excl. 1st token)",
                "TPOT",
                [(o.latency_s - o.ttft_s) / (o.tokens - 1) for o in done if o.tokens > 1],
            ),
            ("Inter-token Latency", "ITL", [gap for o in done for gap in o.itl_s]),
        ):
            ms = np.array(seconds or [0.0]) * 1e3
            lines += [
                f"{heading:-^50}",
                row(f"Mean {name} (ms):", float(ms.mean())),
                row(f"Median {name} (ms):", float(np.median(ms))),
                row(f"P99 {name} (ms):", float(np.percentile(ms, 99))),
            ]
        return "\n".join([*lines, "=" * 50])

    def errors(self) -> dict[str, int]:
        """How often each error came."""
        texts = sorted(o.error for o in self.outcomes if o.error)
        return {text: len(list(group)) for text, group in itertools.groupby(texts)}


def row(label: str, value: int | float) -> str:
    """A line of the table."""
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"


async def measure(
    send: Send,
    samples: Sequence[Sample],
    *,
    concurrency: int | None = None,
    request_rate: float | None = None,
    seed: int = 0,
) -> Report:
    """Sends all samples, at most `concurrency` at once. `request_rate` a second with random gaps; None: no gaps."""
    gate = asyncio.Semaphore(concurrency or len(samples))
    running = peak = 0

    async def one(sample: Sample) -> Outcome:
        nonlocal running, peak
        async with gate:
            running += 1
            peak = max(peak, running)
            try:
                return await _follow(send, sample)
            finally:
                running -= 1

    rng = np.random.default_rng(seed)
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for sample in samples:
            tasks.append(group.create_task(one(sample)))
            if request_rate:
                await asyncio.sleep(float(rng.exponential(1 / request_rate)))
    return Report(tuple(t.result() for t in tasks), time.perf_counter() - begun, concurrency, peak)


async def _follow(send: Send, sample: Sample) -> Outcome:
    outcome = Outcome(len(sample.prompt_token_ids))
    begun = last = time.perf_counter()
    try:
        async for count in send(sample):
            now = time.perf_counter()
            if not outcome.tokens:
                outcome.ttft_s = now - begun
            else:
                outcome.itl_s += [(now - last) / count] * count
            outcome.tokens += count
            last = now
        outcome.latency_s = last - begun
        if not outcome.tokens:
            outcome.error = "no token came"
    except (JaxserveError, OSError, asyncio.IncompleteReadError) as e:
        outcome.error = str(e) or type(e).__name__
    return outcome


def engine_target(client: EngineClient, temperature: float = 0.0) -> Send:
    """Requests straight to an engine, no text and no HTTP in between."""
    numbers = itertools.count()

    async def send(sample: Sample) -> AsyncIterator[int]:
        params = SamplingParams(max_tokens=sample.output_tokens, temperature=temperature, ignore_eos=True)
        request = Request(id=f"bench-{next(numbers)}", prompt_token_ids=sample.prompt_token_ids, params=params)
        async for delta in client.generate(request):
            if delta.token_ids:
                yield len(delta.token_ids)

    return send


@dataclass(frozen=True)
class EngineCounters:
    """What an engine has counted since it started."""

    steps: float
    computed_tokens: float
    padding_tokens: float
    host_s: float
    compiles_serving: float

    def table(self, since: "EngineCounters") -> str:
        """What happened between two readings."""
        steps = self.steps - since.steps
        padding = self.padding_tokens - since.padding_tokens
        tokens = self.computed_tokens - since.computed_tokens + padding
        return "\n".join(
            (
                f"{'Engine':-^50}",
                row("Steps:", int(steps)),
                row("Mean host time a step (us):", (self.host_s - since.host_s) / steps * 1e6 if steps else 0.0),
                row("Padding share of computed tokens (%):", 100 * padding / tokens if tokens else 0.0),
                row("Compilations while serving:", int(self.compiles_serving - since.compiles_serving)),
            )
        )


async def engine_counters(client: EngineClient) -> EngineCounters:
    """Reads an engine's metrics."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families((await client.metrics_text()).decode()):
        for sample in family.samples:
            name = sample.name + (":serving" if sample.labels.get("phase") == "serving" else "")
            sums[name] = sums.get(name, 0.0) + sample.value
    return EngineCounters(
        sums["jaxserve_steps_total"],
        sums["jaxserve_computed_tokens_total"],
        sums["jaxserve_padding_tokens_total"],
        sums["jaxserve_host_gap_seconds_sum"],
        sums["jaxserve_xla_compiles_total:serving"],
    )


class HttpTarget:
    """An OpenAI-compatible server, over kept-alive connections. Use as an async context manager.

    base_url: `http://host:port`, with or without /v1.
    """

    def __init__(self, base_url: str, model: str | None = None, api_key: str | None = None, temperature: float = 0.0):
        url = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"base_url must be http://host:port, got {base_url!r}")
        self._tls = url.scheme == "https"
        self._host = url.hostname
        self._port = url.port or (443 if self._tls else 80)
        self._authority = authority(self._host, self._port)
        self._path = url.path.rstrip("/").removesuffix("/v1")
        self._model = model
        self._api_key = api_key
        self._temperature = temperature
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> "HttpTarget":
        return self

    async def __aexit__(self, *exc: object) -> None:
        for _, writer in self._idle:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def model(self) -> str:
        """The model asked for: the one given, else the first that the server lists."""
        if self._model is None:
            listed = b"".join([part async for part in self._request("GET", "/v1/models")])
            self._model = str(msgspec.json.decode(listed)["data"][0]["id"])
        return self._model

    async def send(self, sample: Sample) -> AsyncGenerator[int]:
        """A streamed completion. Counts tokens by their ids, or one for each event where the server gives no ids."""
        body = {
            "model": await self.model(),
            "prompt": sample.prompt_token_ids,
            "max_tokens": sample.output_tokens,
            "temperature": self._temperature,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async for data in _events(self._request("POST", "/v1/completions", msgspec.json.encode(body))):
            if data == b"[DONE]":
                continue
            event = msgspec.json.decode(data)
            if "error" in event:
                raise JaxserveError(str(event["error"].get("message", event["error"])))
            for choice in event.get("choices", ()):
                ids = choice.get("token_ids")
                count = len(ids) if ids is not None else int(bool(choice.get("text")))
                if count:
                    yield count

    async def _request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[bytes]:
        """The parts of the response's body. Raises JaxserveError unless the status is 200."""
        key = f"Authorization: Bearer {self._api_key}\r\n" if self._api_key else ""
        head = (
            f"{method} {self._path}{path} HTTP/1.1\r\nHost: {self._authority}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{key}\r\n"
        )
        try:
            reader, writer, status, headers = await self._ask(head.encode() + body)
            whole = False
            try:
                parts = _body(reader, headers)
                if status != 200:
                    text = b"".join([part async for part in parts]).decode(errors="replace")
                    raise JaxserveError(f"{method} {path}: HTTP {status}: {text[:500]}")
                async for part in parts:
                    yield part
                whole = headers.get("connection", "").lower() != "close"
            finally:
                if whole:
                    self._idle.append((reader, writer))
                else:
                    writer.close()
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise JaxserveError(f"{self._authority} closed the connection") from error

    async def _ask(self, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int, dict[str, str]]:
        """Sends a request and reads its response's head: status and headers.

        A server may end a connection that it kept just as the next request comes: then it is sent again by another.
        """
        while True:
            kept = bool(self._idle)
            reader, writer = self._idle.pop() if kept else await self._connect()
            try:
                writer.write(request)
                return reader, writer, *await _read_head(reader)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                writer.close()
                begun = isinstance(error, asyncio.IncompleteReadError) and error.partial
                if not kept or begun:
                    raise
            except BaseException:
                writer.close()
                raise

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_connection(self._host, self._port, ssl=self._tls or None)
        except OSError as error:
            raise JaxserveError(f"cannot connect to {self._authority}: {error}") from error


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {k.strip().lower(): v.strip() for k, v in (line.split(":", 1) for line in lines[1:] if ":" in line)}
    return int(lines[0].split()[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        headers["connection"] = "close"  # the body ends with the connection
        while part := await reader.read(65536):
            yield part


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event; events may be split and joined by the parts in any way."""
    rest = b""
    async for part in parts:
        *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            data = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield b"\n".join(data)
