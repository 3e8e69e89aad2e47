"""What is counted and timed: EngineMetrics beside the step loop, FrontMetrics beside the text.

Names beginning `vllm:` mean what vLLM's metrics of the same name mean; `jaxserve_*` are our own.
Each process has its own registry; `/metrics` is the front end's text followed by the engine's.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_ITL = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_E2E = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_HTTP = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_GAP = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 1)


class EngineMetrics:
    """The engine's metrics. Written by the engine's thread; what `watch` was given is read when somebody asks."""

    def __init__(self, model_name: str, registry: CollectorRegistry | None = None, *, engine: str = "0"):
        self.registry = registry or CollectorRegistry()
        labels, values = ("model_name", "engine"), (model_name, engine)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry).labels(*values)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry).labels(*values)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry).labels(*values)

        self._running = gauge("vllm:num_requests_running", "Sequences that hold pages and take part in steps")
        self._waiting = gauge("vllm:num_requests_waiting", "Sequences waiting to be admitted")
        by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Waiting sequences by what they wait for: capacity (a slot or pages), deferred (the prompt's pages, "
            "which the first continuation of the same request computes)",
            (*labels, "reason"),
            registry=self.registry,
        )
        self._waiting_capacity = by_reason.labels(*values, "capacity")
        self._waiting_deferred = by_reason.labels(*values, "deferred")
        self._kv_usage = gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use by sequences (1 = all)")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of admitted sequences")
        self.prompt_tokens_cached = counter("vllm:prompt_tokens_cached", "Prompt tokens taken from the prefix cache")
        by_source = Counter(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens of admitted sequences by where their keys and values came from",
            (*labels, "source"),
            registry=self.registry,
        )
        self.prompt_tokens_computed = by_source.labels(*values, "local_compute")
        self.prompt_tokens_hit = by_source.labels(*values, "local_cache_hit")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated")
        self.preemptions = counter("vllm:num_preemptions", "Sequences preempted and recomputed")
        self.prefix_queries = counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache")
        self.prefix_hits = counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache")
        self.iteration_tokens = histogram("vllm:iteration_tokens_total", "Tokens computed in a step", _ITERATION)
        self.queue_time = histogram("vllm:request_queue_time_seconds", "From arrival to the first step", _E2E)
        self.prefill_time = histogram("vllm:request_prefill_time_seconds", "From first step to first token", _E2E)
        self.decode_time = histogram("vllm:request_decode_time_seconds", "From first token to last", _E2E)
        self.inference_time = histogram("vllm:request_inference_time_seconds", "From first step to last token", _E2E)
        self.prefill_computed = histogram(
            "vllm:request_prefill_kv_computed_tokens", "Prompt tokens computed, cached ones left out", _TOKENS
        )
        self.request_preemptions = histogram(
            "vllm:request_num_preemptions", "Preemptions of a sequence until it ended", (0, 1, 2, 5, 10, 20, 50)
        )
        self.params_n = histogram("vllm:request_params_n", "n by request", (1, 2, 5, 10, 20, 50, 128))
        self.params_max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens by request", _TOKENS)
        self.steps = counter("jaxserve_steps", "Steps launched")
        self.computed_tokens = counter("jaxserve_computed_tokens", "Tokens computed in steps, padding left out")
        self.padding_tokens = counter("jaxserve_padding_tokens", "Padding tokens computed in steps")
        self.discarded_tokens = counter("jaxserve_discarded_tokens", "Tokens computed past a sequence's end")
        self.host_gap = histogram(
            "jaxserve_host_gap_seconds", "Host time a step: plan, pack, launch, commit, deliver", _GAP
        )
        self.started = gauge("jaxserve_engine_start_time_seconds", "When this engine started (Unix time)")
        self.started.set(time.time())
        self.weights_version = gauge(
            "jaxserve_weights_version", "How often weights or model code were switched since the engine's first start"
        )
        self._compiles = Counter(
            "jaxserve_xla_compiles", "Programs compiled by phase", (*labels, "phase"), registry=self.registry
        )
        self._loads = Counter(
            "jaxserve_xla_loads",
            "Programs taken from the compile cache by phase",
            (*labels, "phase"),
            registry=self.registry,
        )
        self._compile_seconds = Counter(
            "jaxserve_xla_compile_seconds", "Time spent compiling by phase", (*labels, "phase"), registry=self.registry
        )
        self._device_bytes = Gauge(
            "jaxserve_device_bytes", "Device memory by kind", (*labels, "kind"), registry=self.registry
        )
        self._rejections = Counter(
            "vllm:admission_rejections", "Requests refused at admission", (*labels, "reason"), registry=self.registry
        )
        self._cache_config = Gauge(
            "vllm:cache_config_info",
            "The KV cache's configuration",
            (*labels, "block_size", "num_gpu_blocks", "enable_prefix_caching"),
            registry=self.registry,
        )
        self._values = values
        for phase in ("warmup", "serving", "update"):  # a series that is there and 0 can be alerted on
            self._compiles.labels(*values, phase)
            self._loads.labels(*values, phase)
            self._compile_seconds.labels(*values, phase)

    def watch(
        self,
        *,
        running: Callable[[], int],
        waiting: Callable[[], int],
        deferred: Callable[[], int],
        kv_usage: Callable[[], float],
    ) -> None:
        """Where the gauges of the queue read their values, from any thread."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)
        self._waiting_deferred.set_function(deferred)
        self._waiting_capacity.set_function(lambda: waiting() - deferred())
        self._kv_usage.set_function(kv_usage)

    def program(self, phase: str, seconds: float, *, compiled: bool) -> None:
        """Counts a program that was made ready: compiled, or loaded."""
        if not compiled:
            self._loads.labels(*self._values, phase).inc()
            return
        self._compiles.labels(*self._values, phase).inc()
        self._compile_seconds.labels(*self._values, phase).inc(seconds)

    def device_bytes(self, by_kind: dict[str, int]) -> None:
        for kind, size in by_kind.items():
            self._device_bytes.labels(*self._values, kind).set(size)

    def rejected(self, reason: str) -> None:
        self._rejections.labels(*self._values, reason).inc()

    def cache_config(self, page_size: int, num_pages: int, prefix_caching: bool) -> None:
        self._cache_config.labels(*self._values, str(page_size), str(num_pages), str(prefix_caching)).set(1)

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class JoinedMetrics(Collector):
    """The metrics of several engines as one text: each family once, its series told apart by the label `engine`."""

    def __init__(self, parts: Sequence[EngineMetrics]):
        self._parts = parts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for part in self._parts:
            for metric in part.registry.collect():
                if metric.name in families:
                    families[metric.name].samples.extend(metric.samples)
                else:
                    families[metric.name] = metric
        return families.values()

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)


class RequestTimer:
    """The times of one request: make it at arrival, tell it of tokens, finish it exactly once."""

    def __init__(self, metrics: "FrontMetrics", arrival: float):
        self._metrics = metrics
        self._arrival = arrival
        self._first: float | None = None
        self._last = arrival
        self._finished = False

    def tokens(self, count: int) -> None:
        """`count` tokens have just reached the front end."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._metrics.time_to_first_token.observe(now - self._arrival)
        else:
            for _ in range(count):
                self._metrics.inter_token_latency.observe((now - self._last) / count)
        self._last = now

    def finish(self, reason: str, prompt_tokens: int, completion_tokens: Sequence[int]) -> None:
        """The request has ended: stop, length, abort or error. completion_tokens: of each continuation."""
        if self._finished:
            return
        self._finished = True
        now = time.monotonic()
        m = self._metrics
        m.success(reason)
        m.e2e_latency.observe(now - self._arrival)
        m.request_prompt_tokens.observe(prompt_tokens)
        tokens = sum(completion_tokens)
        m.request_generation_tokens.observe(tokens)
        m.request_longest.observe(max(completion_tokens))
        if self._first is not None and tokens > 1:
            m.time_per_output_token.observe((self._last - self._first) / (tokens - 1))


class FrontMetrics:
    """The front end's metrics: what a user of the API waits for."""

    def __init__(self, model_name: str, registry: CollectorRegistry | None = None):
        self.registry = registry or CollectorRegistry()
        labels, values = ("model_name", "engine"), (model_name, "0")

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry).labels(*values)

        self.time_to_first_token = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _TTFT)
        self.inter_token_latency = histogram("vllm:inter_token_latency_seconds", "Token to token", _ITL)
        self.time_per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time a token after the first, by request", _ITL
        )
        self.e2e_latency = histogram("vllm:e2e_request_latency_seconds", "Arrival to end", _E2E)
        self.request_prompt_tokens = histogram("vllm:request_prompt_tokens", "Prompt tokens by request", _TOKENS)
        self.request_generation_tokens = histogram("vllm:request_generation_tokens", "Tokens by request", _TOKENS)
        self._success = Counter(
            "vllm:request_success", "Requests ended, by reason", (*labels, "finished_reason"), registry=self.registry
        )
        self.request_longest = histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of the longest continuation by request", _TOKENS
        )
        self._http = Counter(
            "http_requests", "HTTP requests answered", ("handler", "method", "status"), registry=self.registry
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's first byte to its answer's last",
            ("handler", "method"),
            buckets=_HTTP,
            registry=self.registry,
        )
        self._values = values

    def success(self, reason: str) -> None:
        self._success.labels(*self._values, reason).inc()

    def http(self, route: str, method: str, status: int, seconds: float) -> None:
        self._http.labels(route, method, str(status)).inc()
        self._http_seconds.labels(route, method).observe(seconds)

    def track(self, arrival: float | None = None) -> RequestTimer:
        """A timer for a request that arrived at `arrival` (time.monotonic(); None: now)."""
        return RequestTimer(self, time.monotonic() if arrival is None else arrival)

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)
