"""The loop: admit, plan, launch, then commit and deliver the step before. Tokens only: no text, HTTP or gRPC."""

import queue
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec
from jax.sharding import Mesh

from jaxserve.config import EngineOptions
from jaxserve.errors import ConfigError, EngineStopped, JaxserveError, ModelChanged, Overloaded
from jaxserve.loading import Progress
from jaxserve.metrics import EngineMetrics
from jaxserve.pages import PagePool
from jaxserve.plans import Plan
from jaxserve.request import Delta, EngineInfo, ErrorInfo, FinishReason, Request, Update, check_request
from jaxserve.runner import Hosts, Launched, Pooled, Prepared, Runner
from jaxserve.scheduler import Scheduler, Stats
from jaxserve.spec import Params

IDLE_WAIT_S = 1.0
"""How long an idle loop sleeps before it looks at deadlines again; any arrival wakes it."""


class Followers(Hosts, Protocol):
    """The other hosts, as the engine on host 0 has them."""

    def failure(self) -> JaxserveError | None:
        """What is wrong with one of them, if a step that failed here may be its doing."""
        ...

    def stop(self, error: JaxserveError | None) -> None:
        """Lets them end, with what ended this engine, or None if it was stopped."""
        ...


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, eq=False)
class _Switch:
    prepared: Prepared
    abort: bool
    done: Future[None]


class Engine:
    """A loaded model and its step loop. `submit`, `abort`, `switch` and `stop` may be called from any thread.

    `deliver` is called by the loop's thread with the deltas of each step. Of several replicas it is number `index`, on
    the devices of `mesh`; where that spans several hosts, `followers` are the others. With `ahead` it is only compiled,
    and cannot run. Raises ConfigError or CheckpointError.
    """

    def __init__(
        self,
        options: EngineOptions,
        path: Path,
        *,
        model_name: str,
        deliver: Callable[[list[Delta]], None],
        progress: Progress = lambda message: None,
        mesh: Mesh | None = None,
        index: int = 0,
        weights_version: int = 0,
        followers: Followers | None = None,
        ahead: bool = False,
    ):
        self.metrics = EngineMetrics(model_name, engine=str(index))
        self.runner = Runner(options, path, self.metrics, progress, mesh, followers, ahead=ahead)
        self._followers = followers
        self.info: EngineInfo = msgspec.structs.replace(self.runner.info, weights_version=weights_version)
        schedule, causal = options.schedule, self.runner.model.causal
        capturing = bool(self.info.taps)
        prefix_caching = schedule.enable_prefix_caching and causal and not capturing
        self.scheduler = Scheduler(
            PagePool(self.info.num_pages, self.info.page_size),
            max_num_seqs=self.info.max_num_seqs,
            max_num_batched_tokens=self.info.max_num_batched_tokens,
            max_model_len=self.info.max_model_len,
            max_queued_requests=schedule.max_queued_requests,
            priorities=schedule.scheduling_policy == "priority",
            prefix_caching=prefix_caching,
            windows=self.info.windows,
            whole_prompts=not causal,
            most_steps=self.runner.most_steps,
            capturing=capturing,
        )
        self.scheduler.weights_version = weights_version
        self.metrics.weights_version.set(weights_version)
        self.metrics.watch(
            running=lambda: len(self.scheduler.running),
            waiting=lambda: len(self.scheduler.waiting),
            deferred=lambda: self.scheduler.num_deferred,
            kv_usage=lambda: self.scheduler.pages.usage,
        )
        self.metrics.cache_config(self.info.page_size, self.info.num_pages, prefix_caching)
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Request | _Abort | _Switch | None] = queue.SimpleQueue()
        self._seen = Stats()
        self._switch: _Switch | None = None
        self._stopping = self._ended = False

    def submit(self, request: Request) -> None:
        """Queues a request. What it is refused with comes back as a delta with an error."""
        self._inbox.put(request)

    def abort(self, request_id: str) -> None:
        """Ends a request; its pages are free for the next step. No delta follows."""
        self._inbox.put(_Abort(request_id))

    def prepare(self, update: Update, params: Params | None = None) -> list[Prepared]:
        """What `switch` takes, of each replica; see Runner.prepare."""
        if self._followers is not None:
            raise ConfigError("weights and code cannot be switched on several hosts; start again with the new ones")
        return [self.runner.prepare(update, params)]

    def switch(self, prepared: list[Prepared], *, abort: bool) -> list[Future[None]]:
        """Switches between two steps, once no request that has begun is left; `abort` ends them with ModelChanged.

        One switch at a time. The futures, one a replica, are done when the next step is of what was prepared, or raise
        EngineStopped.
        """
        (one,) = prepared
        switch = _Switch(one, abort, Future())
        self._inbox.put(switch)
        if self._ended:  # then perhaps nobody looks into the inbox any more
            _fail(switch.done, EngineStopped("the engine was stopped"))
        return [switch.done]

    def stop(self) -> None:
        """Ends the loop after the step that is running; whatever is unfinished gets EngineStopped."""
        self._stopping = True
        self._inbox.put(None)

    def run(self) -> None:
        """The loop, until `stop`. If a step fails, everybody is told and the error is raised."""
        pending: tuple[Plan, Launched | Pooled] | None = None
        checked = False
        try:
            while not self._stopping:
                idle = pending is None and self.scheduler.idle
                deltas = self._admit(block=idle)
                start = time.perf_counter()
                plan = self.scheduler.plan(time.monotonic())
                launched = self._launch(plan) if plan else None
                host = time.perf_counter() - start
                if pending:
                    sampled = pending[1].result()  # waits for the step before, while the next one runs
                    start = time.perf_counter()
                    deltas += self.scheduler.commit(pending[0], sampled, time.monotonic())
                    host += time.perf_counter() - start
                start = time.perf_counter()
                self._measure()  # first: whoever has an answer finds it counted
                if deltas:
                    self._deliver(deltas)
                if plan or pending:
                    self.metrics.host_gap.observe(host + time.perf_counter() - start)
                    checked = False
                elif idle and not checked:  # once each time that the engine comes to rest
                    self.scheduler.check_integrity()
                    checked = True
                elif not idle and not deltas:
                    time.sleep(0.001)  # nothing can run until an abort or a deadline frees something
                pending = (plan, launched) if plan and launched else None
        except Exception as error:
            lost = None if self._followers is None else self._followers.failure()
            ended = lost or EngineStopped(f"the engine failed: {type(error).__name__}")
            self._end(ended)
            if self._followers is not None:
                self._followers.stop(ended)
            if lost is not None:
                raise lost from error
            raise
        self._end(EngineStopped("the engine was stopped"))
        if self._followers is not None:
            self._followers.stop(None)

    def _admit(self, *, block: bool) -> list[Delta]:
        """Takes in what has arrived; waits for something when there is nothing to do."""
        deltas: list[Delta] = []
        while True:
            try:
                item = self._inbox.get(timeout=IDLE_WAIT_S) if block else self._inbox.get_nowait()
            except queue.Empty:
                break
            block = False
            if isinstance(item, _Abort):
                self.scheduler.abort(item.request_id)
            elif isinstance(item, _Switch):
                deltas += self._hold(item)
            elif item is not None:
                deltas += self._accept(item)
        deltas += self.scheduler.expire(time.monotonic())
        if self._switch is not None and not self.scheduler.begun:
            self._install(self._switch)
        return deltas

    def _hold(self, switch: _Switch) -> list[Delta]:
        """Lets nothing new begin until the switch."""
        assert self._switch is None, "one switch at a time"
        self._switch, self.scheduler.holding = switch, True
        if not switch.abort:
            return []
        changed = "weights or model code were switched while this request was in flight; send it again"
        return self.scheduler.fail_all(ModelChanged(changed), begun_only=True)

    def _install(self, switch: _Switch) -> None:
        """Steps in flight are of requests that have ended, and keep the weights that they were launched with."""
        self.runner.install(switch.prepared)
        self.scheduler.renew()
        version = self.scheduler.weights_version
        self.info = msgspec.structs.replace(self.runner.info, weights_version=version)
        self.metrics.weights_version.set(version)
        self._switch = None
        switch.done.set_result(None)

    def _accept(self, request: Request) -> list[Delta]:
        try:
            check_request(request, self.info)
            if request.params.seed is None:
                params = msgspec.structs.replace(request.params, seed=secrets.randbits(63))
                request = msgspec.structs.replace(request, params=params)
            self.scheduler.add(request, time.monotonic())
            self.metrics.params_n.observe(request.params.n)
            if request.params.max_tokens is not None:
                self.metrics.params_max_tokens.observe(request.params.max_tokens)
        except JaxserveError as error:
            self.metrics.rejected("queue_full" if isinstance(error, Overloaded) else "invalid")
            return [_refusal(request, i, error) for i in range(request.params.n)]
        return []

    def _launch(self, plan: Plan) -> Launched | Pooled:
        launched, padding = self.runner.launch(plan)
        self.metrics.steps.inc(plan.steps)
        self.metrics.computed_tokens.inc(plan.num_computed)
        self.metrics.padding_tokens.inc(padding)
        for _ in range(plan.steps):
            self.metrics.iteration_tokens.observe(plan.num_tokens)
        return launched

    def _measure(self) -> None:
        m, now, seen = self.metrics, self.scheduler.stats, self._seen
        if now.generated_tokens != seen.generated_tokens:
            m.generation_tokens.inc(now.generated_tokens - seen.generated_tokens)
            seen.generated_tokens = now.generated_tokens
        if now != seen:  # the rest changes only where requests come and go
            prompt, cached = now.prompt_tokens - seen.prompt_tokens, now.cached_tokens - seen.cached_tokens
            m.preemptions.inc(now.preemptions - seen.preemptions)
            m.prompt_tokens.inc(prompt)
            m.prompt_tokens_cached.inc(cached)
            m.prompt_tokens_hit.inc(cached)
            m.prompt_tokens_computed.inc(prompt - cached)
            m.prefix_queries.inc(now.looked_up_tokens - seen.looked_up_tokens)
            m.prefix_hits.inc(now.hit_tokens - seen.hit_tokens)
            m.discarded_tokens.inc(now.discarded_tokens - seen.discarded_tokens)
            self._seen = replace(now)
        for sequence in self.scheduler.ended:
            m.request_preemptions.observe(sequence.num_preemptions)
            m.prefill_computed.observe(sequence.num_prompt - sequence.num_cached)
            if sequence.started is not None:
                m.queue_time.observe(sequence.started - sequence.arrival)
            if sequence.started is not None and sequence.first_token is not None and sequence.ended is not None:
                m.prefill_time.observe(sequence.first_token - sequence.started)
                m.decode_time.observe(sequence.ended - sequence.first_token)
                m.inference_time.observe(sequence.ended - sequence.started)
        self.scheduler.ended.clear()

    def _end(self, error: JaxserveError) -> None:
        self.runner.close()
        self._ended = True
        deltas = self.scheduler.fail_all(error)
        if self._switch is not None:
            _fail(self._switch.done, error)
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Request):
                deltas += [_refusal(item, i, error) for i in range(item.params.n)]
            elif isinstance(item, _Switch):
                _fail(item.done, error)
        if deltas:
            self._deliver(deltas)


def _fail(done: Future[None], error: Exception) -> None:
    with suppress(InvalidStateError):  # somebody else has
        done.set_exception(error)


def _refusal(request: Request, index: int, error: JaxserveError) -> Delta:
    return Delta(request.id, index, finish=FinishReason.ERROR, error=ErrorInfo.of(error))
