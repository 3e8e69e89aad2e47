"""An engine in a thread, driven from a test's own thread: requests in, what each sequence got out."""

import queue
import time
from dataclasses import dataclass, field

from jaxserve.client.thread import EngineThread
from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions, ScheduleOptions
from jaxserve.request import Logprobs, Request, SamplingParams


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: tuple | None = None
    cached: int | None = None
    finish: str | None = None
    stop_token: int | None = None
    error: str | None = None
    captured: list[list[bytes]] = field(default_factory=list)
    """For each tap what came of it."""


class Running:
    """`with Running(path, ...) as engine: engine.run({...})`"""

    def __init__(
        self, path, *, pages=None, seqs=4, budget=32, page=4, length=None, warmup="full", mesh=None, attention="auto",
        code=None, cache="auto", capture=(), **schedule,
    ):  # fmt: skip
        options = EngineOptions(
            model=ModelOptions(dtype="float32", max_model_len=length, model_code=code),
            schedule=ScheduleOptions(max_num_seqs=seqs, max_num_batched_tokens=budget, **schedule),
            device=DeviceOptions(
                block_size=page, num_kv_pages=pages, warmup=warmup, mesh=mesh, attention=attention, kv_cache_dtype=cache
            ),
            capture=tuple(capture),
        )
        self._deltas = queue.Queue()
        self.thread = EngineThread(options, path, model_name="test", deliver=self._deltas.put)

    def __enter__(self):
        self.thread.start()
        self.thread.wait_ready()
        self.engine = self.thread.engine
        return self

    def __exit__(self, *exc):
        self.thread.stop()

    def run(self, requests: dict[str, Request]) -> dict[tuple[str, int], Result]:
        """Submits all at once and waits for every sequence's end; afterwards no page may be held."""
        results = {(r.id, i): Result() for r in requests.values() for i in range(r.params.n)}
        for request in requests.values():
            self.thread.submit(request)
        while any(r.finish is None for r in results.values()):
            for delta in self._deltas.get(timeout=120):
                result = results.get((delta.request_id, delta.index))
                if result is None:  # of a request that a test submitted by itself
                    continue
                assert result.finish is None, "a delta after the last one"
                result.tokens += delta.token_ids
                result.logprobs += delta.logprobs or ()
                result.prompt_logprobs = delta.prompt_logprobs or result.prompt_logprobs
                result.cached = delta.num_cached_tokens if result.cached is None else result.cached
                result.finish, result.stop_token = delta.finish, delta.stop_token_id
                if delta.captured is not None:
                    result.captured = result.captured or [[] for _ in delta.captured]
                    for pieces, piece in zip(result.captured, delta.captured, strict=True):
                        pieces.append(piece)
                result.error = delta.error and delta.error.kind
        return results

    def one(self, prompt, **params) -> Result:
        return self.run({"one": request("one", prompt, **params)})["one", 0]

    def metric(self, name, **labels) -> float:
        registry = self.engine.metrics.registry
        return registry.get_sample_value(name, {"model_name": "test", "engine": "0", **labels}) or 0.0

    def programs(self, phase) -> float:
        """How many were made ready, compiled or loaded."""
        return sum(self.metric(f"jaxserve_xla_{how}_total", phase=phase) for how in ("compiles", "loads"))

    def wait_idle(self):
        """Until nothing is running or waiting, and nothing is held."""
        for _ in range(1000):
            if self.engine.scheduler.idle and self.engine.scheduler.pages.usage == 0:
                return
            time.sleep(0.01)
        raise AssertionError("pages are still held")


def request(name, prompt, **params) -> Request:
    own = ("priority", "timeout_s", "cache_salt", "eos_token_ids")
    extra = {k: params.pop(k) for k in own if k in params}
    params.setdefault("temperature", 0.0)
    return Request(id=name, prompt_token_ids=tuple(prompt), params=SamplingParams(**params), **extra)
