"""Owns the device: parameters, the donated step state, and one compiled step a shape. Knows nothing of requests' fates.

launch(plan) -> Launched   returns at once; Launched.result() waits for the sampled tokens
"""

import logging
import math
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import attention, batch, sampling
from jaxserve.batch import Layout, Shape, SlotRows
from jaxserve.config import EngineOptions
from jaxserve.errors import ConfigError
from jaxserve.host_memory import host_memory
from jaxserve.loading import Progress, load_model
from jaxserve.metrics import EngineMetrics
from jaxserve.native.attention import untouched_cache
from jaxserve.request import MAX_BIAS_IDS, MAX_STOP_IDS, MAX_TOP_LOGPROBS, EngineInfo, Logprobs
from jaxserve.sampling import SlotState, TokenLogprobs
from jaxserve.scheduler import Plan, Sampled, Sequence
from jaxserve.spec import CacheSpec, Model, Params

log = logging.getLogger("jaxserve.runner")

CPU_TOKENS_PER_SEQ = 512
"""The default KV cache on CPU holds this many tokens a sequence: host memory is shared with everything else."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """What every step takes, changes in place and returns."""

    cache: jax.Array  # [layers * pages, page_size, kv_heads * 2 * head_dim]
    slots: SlotState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What a step brings back, by row and, for prompts, by token."""

    tokens: jax.Array  # [S]
    logprobs: TokenLogprobs  # [S]
    prompt_logprobs: TokenLogprobs  # [T]


@dataclass(frozen=True)
class Sizes:
    """Every number that the options left open, worked out."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)


class Launched:
    """A step that is on its way. `result` waits for it."""

    def __init__(self, plan: Plan, output: StepOutput):
        self._plan, self._output = plan, output
        self._logprobs = any(r.last and r.sequence.request.params.logprobs is not None for r in plan.rows)
        self._prompt = output.prompt_logprobs.logprob.size > 0 and any(
            r.sequence.prompt_logprobs is not None for r in plan.rows
        )
        output.tokens.copy_to_host_async()
        for wanted, part in ((self._logprobs, output.logprobs), (self._prompt, output.prompt_logprobs)):
            if wanted:
                jax.tree.map(lambda a: a.copy_to_host_async(), part)

    def result(self) -> Sampled:
        sampled = Sampled(np.asarray(self._output.tokens).tolist())
        if self._logprobs:
            host = jax.tree.map(np.asarray, self._output.logprobs)
            for i, row in enumerate(self._plan.rows):
                top = row.sequence.request.params.logprobs
                if top is not None and row.last:
                    sampled.logprobs[i] = _logprobs(host, i, top)
        if self._prompt:
            host, at = jax.tree.map(np.asarray, self._output.prompt_logprobs), 0
            for i, row in enumerate(self._plan.rows):
                top = row.sequence.request.params.prompt_logprobs
                if row.sequence.prompt_logprobs is not None and top is not None:
                    wanted = max(0, min(row.count, row.sequence.num_prompt - 1 - row.start))
                    sampled.prompt_logprobs[i] = [_logprobs(host, at + j, top) for j in range(wanted)]
                at += row.count
        return sampled


class Runner:
    """One model on its device. `info` says what was worked out; `launch` and `bind` belong to one thread."""

    def __init__(self, options: EngineOptions, path: Path, metrics: EngineMetrics, progress: Progress):
        loaded = load_model(options.model, options.device, path, progress)
        self.model, self.config, self._kernel = loaded.model, loaded.config, loaded.kernel
        self._metrics = metrics
        self._device = loaded.device
        platform = self._device.platform
        self._attention, self._kv_dtype, self._programs = loaded.attention, loaded.kv_dtype, loaded.programs
        self._params, self._tree = jax.tree.flatten(loaded.params)
        weights = sum(a.nbytes for a in self._params)
        spec = self.model.cache_spec(self.config)
        self._lock = threading.Lock()
        self._closing = False
        self._least = 1 if platform == "cpu" else 8  # one row is a product of its own on CPU; below 8 no gain elsewhere
        self.sizes, self._compiled, workspace = self._fit(options, spec, weights, progress)
        self._layout = self._layouts(self.sizes)
        self._rows = SlotRows(self.sizes.max_num_seqs, self.sizes.pages_per_seq)
        self.shapes = tuple(self._layout)
        """Shapes that may be launched: the compiled ones, or with lazy warm-up all."""
        self._state = self._new_state(loaded.attention == "cpu")
        self._bind = self._compile_bind()
        self._pool: ThreadPoolExecutor | None = None
        self._warm_up(options.device.warmup, progress)
        kv, slots = self._state.cache.nbytes, _bytes(self._state.slots)
        self.info = EngineInfo(
            model=str(path),
            architecture=self.model.name,
            vocab_size=self.config.vocab,
            max_model_len=self.sizes.max_model_len,
            max_num_seqs=self.sizes.max_num_seqs,
            max_num_batched_tokens=self.sizes.max_num_batched_tokens,
            page_size=self.sizes.page_size,
            num_pages=self.sizes.num_pages,
            dtype=loaded.dtype.name,
            num_params=sum(math.prod(s.shape) for s in jax.tree.leaves(self.model.param_specs(self.config))),
            platform=platform,
            attention=loaded.attention,
            priorities=options.schedule.scheduling_policy == "priority",
            device_bytes={"weights": weights, "kv": kv, "slots": slots, "workspace": workspace},
        )
        metrics.device_bytes(self.info.device_bytes)
        gib = 2**30
        pages = f"{self._kv_dtype.name}, {self.sizes.num_pages} pages of {self.sizes.page_size} tokens"
        progress(
            f"memory: weights {weights / gib:.2f} + KV {kv / gib:.2f} ({pages}) + slots {slots / gib:.2f} "
            f"+ workspace {workspace / gib:.2f} = {(weights + kv + slots + workspace) / gib:.2f} GiB"
        )

    def launch(self, plan: Plan) -> tuple[Launched, int]:
        """Starts a step and returns it with its padding tokens. Steps run in launch order."""
        for sequence in plan.admitted:
            if _needs_binding(sequence):
                self._state = self._bind(self._state, *self._binding(sequence))
        shape = batch.pick(self.shapes, plan)
        compiled = self.compiled(shape)
        self._rows.update(plan)
        buffer = self._layout[shape].pack(plan, self._rows)
        self._state, output = compiled(self._params, self._state, buffer)
        return Launched(plan, output), shape.tokens - plan.num_tokens

    def compiled(self, shape: Shape) -> jax.stages.Compiled:
        """The step of one of `shapes`, compiled now if it is not yet."""
        return self._compiled.get(shape) or self._compile_now(shape)

    @property
    def params(self) -> Params:
        """The weights as the model file sees them."""
        return jax.tree.unflatten(self._tree, self._params)

    def _layouts(self, sizes: Sizes) -> dict[Shape, Layout]:
        known = batch.shapes(sizes.max_num_seqs, sizes.max_num_batched_tokens, self._least)
        return {s: Layout(s, sizes.pages_per_seq, sizes.max_num_seqs) for s in known}

    def _abstract(self, sizes: Sizes) -> StepState:
        spec = self.model.cache_spec(self.config)
        cache = jax.ShapeDtypeStruct((spec.layers * sizes.num_pages, sizes.page_size, spec.row), self._kv_dtype)
        return StepState(cache, _slots(sizes.max_num_seqs, sizes.max_model_len))  # type: ignore[arg-type]  # a tree of shapes

    def _new_state(self, by_cpu_kernel: bool) -> StepState:
        state = self._abstract(self.sizes)
        # As large as the longest context: to clear it takes seconds, and memory that may never be used.
        new_cache = untouched_cache if by_cpu_kernel else jnp.zeros

        def new() -> StepState:
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state.slots)
            return StepState(new_cache(state.cache.shape, state.cache.dtype), zeros)

        return self._programs.get(("state", by_cpu_kernel, state), new)()

    def _compile_bind(self) -> jax.stages.Compiled:
        """Compiled ahead, as the steps are: called as it is, jit would compile again for every origin of the state."""
        return self._programs.get("bind", _bind, self._abstract(self.sizes), *self._no_binding(), donate=0)

    def _compile(self, shape: Shape, sizes: Sizes) -> jax.stages.Compiled:
        layout = Layout(shape, sizes.pages_per_seq, sizes.max_num_seqs)
        step = partial(_step, self.model, self.config, self._kernel, self._tree, layout)
        params = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self._params]
        state, buffer = self._abstract(sizes), jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        what = ("step", self.config, self._kernel.__module__, shape, sizes, self._tree)
        return self._programs.get(what, step, params, state, buffer, donate=1)

    def _timed_compile(self, shape: Shape, sizes: Sizes, phase: str) -> jax.stages.Compiled:
        start = time.perf_counter()
        compiled = self._compile(shape, sizes)
        self._metrics.compiled(phase, time.perf_counter() - start)
        return compiled

    def _compile_now(self, shape: Shape) -> jax.stages.Compiled:
        self._compiled[shape] = self._timed_compile(shape, self.sizes, "serving")
        return self._compiled[shape]

    def _fit(
        self, options: EngineOptions, spec: CacheSpec, weights: int, progress: Progress
    ) -> tuple[Sizes, dict[Shape, jax.stages.Compiled], int]:
        """Sizes the KV cache by what the compiled largest step leaves of the memory; returns that step too."""
        cpu = self._device.platform == "cpu"
        wanted_len = options.model.max_model_len
        length = wanted_len or self.config.max_positions
        if wanted_len is not None and wanted_len > self.config.max_positions:
            raise ConfigError(f"max_model_len {wanted_len} exceeds the model's {self.config.max_positions} positions")
        seqs = options.schedule.max_num_seqs or (64 if cpu else 256)
        tokens = options.schedule.max_num_batched_tokens or max(seqs, 512 if cpu else 2048)
        if tokens < seqs:
            raise ConfigError(
                f"max_num_batched_tokens {tokens} is less than max_num_seqs {seqs}: every running sequence needs its "
                "token; raise --max-num-batched-tokens or lower --max-num-seqs"
            )
        largest, *_ = batch.covering(batch.shapes(seqs, tokens, self._least))
        page = attention.page_size(
            options.device.block_size, self._attention, self._device.platform, self._kv_dtype, largest.seqs, length
        )
        given = options.device.num_kv_pages
        page_bytes = spec.layers * page * spec.row * self._kv_dtype.itemsize

        def sizes(pages: int) -> Sizes:
            fitting = min(length, pages * page)
            if wanted_len is not None and fitting < wanted_len:
                raise ConfigError(
                    f"max_model_len {wanted_len} needs {-(-wanted_len // page)} pages of KV cache and {pages} fit; "
                    "lower --max-model-len, or raise --memory-utilization or --num-kv-pages"
                )
            return Sizes(fitting, seqs, tokens, page, pages)

        if given is None:
            total = _device_memory(self._device) + (weights if cpu else 0)  # on CPU: what was free before the weights
            share = options.device.memory_utilization or (0.5 if cpu else 0.9)
            budget = int(total * share) - weights - _bytes(_slots(seqs, length))
            pages = budget // page_bytes
            if pages < 1:
                raise ConfigError(
                    f"weights of {weights / 2**30:.2f} GiB leave no room for the KV cache: {share:.0%} of "
                    f"{total / 2**30:.2f} GiB may be used; raise --memory-utilization"
                )
            if cpu:
                pages = min(pages, -(-max(length, seqs * CPU_TOKENS_PER_SEQ) // page))
        else:
            pages = given
        progress("compiling the largest step")
        # Off the CPU a program that cannot fit does not compile: measure with a small cache, then size and compile.
        trial = pages if cpu or given else min(pages, -(-length // page))
        compiled = self._timed_compile(largest, sizes(trial), "warmup")
        workspace = _workspace(compiled)
        if given is None:
            pages = min(pages, (budget - workspace) // page_bytes)
            if pages < 1:
                raise ConfigError(
                    f"the largest step needs {workspace / 2**30:.2f} GiB of workspace, which leaves no room for the KV "
                    "cache; lower --max-num-batched-tokens or --max-num-seqs"
                )
        found = sizes(pages)
        if pages != trial:
            compiled = self._timed_compile(largest, found, "warmup")
        if found.max_model_len < length:
            progress(f"max_model_len lowered from {length} to {found.max_model_len}: that is what the KV cache holds")
        return found, {largest: compiled}, workspace

    def _warm_up(self, warmup: str, progress: Progress) -> None:
        """full: compiles every shape. min: a few shapes serve until the others, in the background, are there."""
        if warmup == "lazy":
            return
        first = batch.covering(self.shapes) if warmup == "min" else self.shapes
        # Prompts are what the largest step is least fit for; steps of one token a sequence have a larger one that fits.
        missing = sorted((s for s in self.shapes if s not in self._compiled), key=lambda s: (s.single, s))
        self.shapes = tuple(sorted(self._compiled))
        threads = os.cpu_count() or 1
        with ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool:
            for job in as_completed([pool.submit(self._compile_ahead, s) for s in missing if s in first]):
                job.result()
                progress(f"compiling steps {len(self.shapes)}/{len(first)}")
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="compile", initializer=_give_way)
        for shape in missing:
            if shape not in first:
                self._pool.submit(self._compile_ahead, shape)
        self._pool.shutdown(wait=False)

    def _compile_ahead(self, shape: Shape) -> None:
        if self._closing or not threading.main_thread().is_alive():  # the interpreter waits for this thread to end
            return
        try:
            compiled = self._timed_compile(shape, self.sizes, "warmup")
        except Exception:
            log.exception("compiling %s failed; larger steps go on serving what it was meant for", shape)
            raise
        with self._lock:
            self._compiled[shape] = compiled
            self.shapes = tuple(sorted(self._compiled))

    def close(self) -> None:
        """Gives up what is still to be compiled in the background."""
        self._closing = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _no_binding(self) -> tuple[Any, ...]:
        return (
            np.int32(self.sizes.max_num_seqs),  # the slot that is nobody's
            np.zeros(self.sizes.max_model_len, np.int32),
            np.full(MAX_BIAS_IDS, -1, np.int32),
            np.zeros(MAX_BIAS_IDS, np.float32),
            np.full(MAX_STOP_IDS, -1, np.int32),
        )

    def _binding(self, sequence: Sequence) -> tuple[Any, ...]:
        params, request = sequence.request.params, sequence.request
        _, history, ids, values, stops = self._no_binding()
        history[: len(sequence.tokens)] = sequence.tokens
        bias = params.bias()
        ids[: len(bias)] = list(bias)
        values[: len(bias)] = list(bias.values())
        stop = list({*params.stop_token_ids, *(() if params.ignore_eos else request.eos_token_ids)})
        stops[: len(stop)] = stop
        return np.int32(sequence.slot), history, ids, values, stops


def _give_way() -> None:
    """Lets the steps go before this thread's work, and before that of the threads it starts."""
    if sys.platform == "linux":  # elsewhere a priority is the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _slots(seqs: int, length: int) -> SlotState:
    """The shapes of what the slots remember; few bytes unless the context is very long."""
    return jax.eval_shape(lambda: SlotState.empty(seqs + 1, length, MAX_BIAS_IDS, MAX_STOP_IDS))


def _bytes(tree: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _needs_binding(sequence: Sequence) -> bool:
    p = sequence.request.params
    return bool(
        p.repetition_penalty != 1
        or p.presence_penalty
        or p.frequency_penalty
        or p.logit_bias
        or p.banned_token_ids
        or p.allowed_token_ids
        or p.min_tokens
    )


def _bind(state: StepState, *binding: jax.Array) -> StepState:
    return StepState(state.cache, sampling.bind(state.slots, *binding))


def _step(
    model: Model,
    config: Any,
    kernel: Any,
    tree: Any,
    layout: Layout,
    params: list[jax.Array],
    state: StepState,
    buffer: jax.Array,
) -> tuple[StepState, StepOutput]:
    """One step, whole: resolve tokens, forward, logits of the last rows, sample, remember."""
    weights, step = jax.tree.unflatten(tree, params), layout.unpack(buffer)
    size, seqs = layout.shape.tokens, layout.shape.seqs
    t = jnp.arange(size, dtype=jnp.int32)
    live = t < step.cu_q_lens[step.distribution[2]]
    s = jnp.clip(jnp.searchsorted(step.cu_q_lens[1:], t, side="right").astype(jnp.int32), 0, seqs - 1)  # [T]
    positions = jnp.where(live, step.kv_lens[s] - step.cu_q_lens[s + 1] + t, 0)
    slot = jnp.where(live, step.slots[s], layout.num_slots)

    history = state.slots.history
    tokens = jnp.where(step.tokens >= 0, step.tokens, history.at[slot, positions].get(mode="clip"))
    # One read before the write: fused into each of its users, the old history would have to be kept as a copy.
    tokens, history = jax.lax.optimization_barrier((tokens, history))
    history = _remember(history, slot, positions, tokens)

    with jax.named_scope("forward"):
        layers = model.cache_spec(config).layers
        attend = attention.bind(kernel, layers, step.kv_lens, step.page_table, step.cu_q_lens, step.distribution)
        hidden, cache = model.forward(weights, config, tokens, positions, state.cache, attend)
    with jax.named_scope("logits"):
        last = hidden[jnp.clip(step.cu_q_lens[1:] - 1, 0, size - 1)]  # [S, D]
        logits = model.logits(weights, config, last)  # [S, V]
    with jax.named_scope("sample"):
        top = min(MAX_TOP_LOGPROBS, logits.shape[-1])
        slots = replace(state.slots, history=history)
        sampled = sampling.sample(logits, step.rows, step.slots, slots)
        logprobs = jax.lax.cond(
            step.rows.logprobs.any(),
            lambda: sampling.token_logprobs(logits, jnp.where(step.rows.logprobs, sampled, -1), top),
            lambda: sampling.no_logprobs(seqs, top),
        )
        if layout.shape.single:
            prompt = sampling.no_logprobs(0, top)
        else:
            prompt = sampling.prompt_logprobs(partial(model.logits, weights, config), hidden, step.targets, top)
    target = jnp.where(step.samples > 0, step.slots, layout.num_slots)
    history = _remember(history, target, step.rows.position, sampled)
    return StepState(cache, replace(slots, history=history)), StepOutput(sampled, logprobs, prompt)


def _remember(history: jax.Array, slot: jax.Array, position: jax.Array, token: jax.Array) -> jax.Array:
    """Writes each token to its place; those of no sequence go to the last slot, which is nobody's."""
    if token.size == 1:  # XLA makes a scatter of one row a select over a copy of everything
        return jax.lax.dynamic_update_slice(history, token[None], (slot[0], position[0]))
    return history.at[slot, position].set(token, mode="drop")


def _logprobs(host: TokenLogprobs, i: int, top: int) -> Logprobs:
    return Logprobs(
        float(host.logprob[i]),
        int(host.rank[i]),
        tuple(host.top_ids[i, :top].tolist()),
        tuple(host.top_logprobs[i, :top].tolist()),
    )


def _workspace(compiled: jax.stages.Compiled) -> int:
    """Bytes a step needs besides its arguments and the state it updates in place."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _device_memory(device: jax.Device) -> int:
    """Bytes that the device has, or on CPU those that are free."""
    if device.platform != "cpu":
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            raise ConfigError(f"{device.device_kind} does not say how much memory it has; give --num-kv-pages")
        return int(stats["bytes_limit"])
    return host_memory().free
