"""Owns the device: parameters, the donated step state, and one compiled step a shape. Knows nothing of requests' fates.

launch(plan) -> Launched   returns at once; Launched.result() waits for the sampled tokens
"""

import hashlib
import logging
import math
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import msgspec
import numpy as np
from jax.sharding import Mesh

from jaxserve import baked, batch, captured
from jaxserve.batch import Shape, SlotRows
from jaxserve.config import EngineOptions, MeshShape
from jaxserve.errors import ConfigError
from jaxserve.host_memory import give_back
from jaxserve.loading import Loaded, Progress, start_loading
from jaxserve.metrics import EngineMetrics
from jaxserve.page_groups import capacity
from jaxserve.plans import Plan, Sampled, Sequence
from jaxserve.request import EngineInfo, Logprobs, Update
from jaxserve.sampling import TokenLogprobs
from jaxserve.sharding import bytes_per_device
from jaxserve.sizing import Sizing, workspace_of
from jaxserve.spec import Params
from jaxserve.step import Program, Programs, Sizes, StepOutput, no_binding
from jaxserve.update import edited, weights_at, weights_of

log = logging.getLogger("jaxserve.runner")


class Launched:
    """A launch that is on its way. `result` waits for it."""

    def __init__(self, plan: Plan, output: StepOutput):
        self._plan, self._output = plan, output
        self._logprobs = any(r.last and r.sequence.request.params.logprobs is not None for r in plan.rows)
        self._prompt = any(row.scored for row in plan.rows)
        wanted: list[Any] = [output.tokens, output.captured]
        wanted += [output.logprobs] if self._logprobs else []
        wanted += [output.prompt_logprobs] if self._prompt else []
        jax.tree.map(lambda a: a.copy_to_host_async(), wanted)

    def result(self) -> Sampled:
        tokens = np.asarray(self._output.tokens)  # [S], or of several steps [N, S]
        by_row = np.atleast_2d(tokens).T[: len(self._plan.rows)].tolist()
        sampled = Sampled([[token for token in row if token >= 0] for row in by_row])
        if self._logprobs:
            host = jax.tree.map(np.asarray, self._output.logprobs)
            if tokens.ndim == 1:
                host = jax.tree.map(lambda a: a[None], host)
            for i, row in enumerate(self._plan.rows):
                top = row.sequence.request.params.logprobs
                if top is not None and row.last:
                    sampled.logprobs[i] = [_logprobs(host, (n, i), top) for n in range(len(sampled.tokens[i]))]
        if self._prompt:
            host, at = jax.tree.map(np.asarray, self._output.prompt_logprobs), 0
            for i, row in enumerate(self._plan.rows):
                top = row.sequence.request.params.prompt_logprobs
                if top is not None and (scored := row.scored):
                    first = at - 1 - row.start  # what a token says is of the one after it
                    sampled.prompt_logprobs[i] = [_logprobs(host, (first + position,), top) for position in scored]
                at += row.count
        if self._output.captured:
            values, at = [np.asarray(a) for a in self._output.captured], 0
            for i, row in enumerate(self._plan.rows):
                if here := row.captured:
                    first, end = at + here.start - row.start, at + here.stop - row.start
                    sampled.captured[i] = tuple(a[first:end].tobytes() for a in values)
                at += row.count
        return sampled


class Pooled:
    """The same of a step that makes embeddings."""

    def __init__(self, plan: Plan, rows: jax.Array):
        self._plan, self._rows = plan, rows
        rows.copy_to_host_async()

    def result(self) -> Sampled:
        host = np.asarray(self._rows)
        return Sampled((), embeddings={i: host[i].tobytes() for i, row in enumerate(self._plan.rows) if row.last})


class Launch(NamedTuple):
    """A launch as the devices know it, without its plan: the same on every host."""

    shape: Shape
    buffer: np.ndarray  # int32 [Layout.size]
    bindings: list[tuple[Any, ...]]
    """What binds a slot before it, as `no_binding` has it."""


class Hosts(Protocol):
    """The other hosts of a mesh that spans several. Each runs the launches of host 0, in their order."""

    def least(self, pages: int) -> int:
        """The least of what all hosts say here."""
        ...

    def known(self, shape: Shape) -> bool:
        """Whether all others can launch a shape."""
        ...

    def begin(self, launch: Launch) -> int:
        """Says that a launch begins here; its number."""
        ...

    def launched(self, number: int, output: StepOutput | jax.Array) -> None:
        """Says, once the output is there, that a launch has finished here."""
        ...


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `Runner.prepare` has made ready for `install`."""

    loaded: Loaded
    path: Path
    """The checkpoint whose config counts."""
    reread: bool
    """Whether it holds the weights, too."""
    programs: Programs
    compiled: dict[Shape, jax.stages.Compiled] | None = None
    """The steps of edited code; None where they stay."""


class Runner:
    """One model on the devices of `mesh`, or of the options' mesh. `info` says what was worked out.

    `launch` and `execute` belong to one thread. Of a mesh that spans several hosts, `hosts` are the others.
    """

    def __init__(
        self,
        options: EngineOptions,
        path: Path,
        metrics: EngineMetrics,
        progress: Progress,
        mesh: Mesh | None = None,
        hosts: Hosts | None = None,
        *,
        ahead: bool = False,
    ):
        """With `ahead` there are no weights: everything is compiled and kept, and nothing can be launched."""
        self._hosts, self._metrics, self._closing = hosts, metrics, False
        self._options, self._path, self._reread = options.model, path, True
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        with start_loading(
            options.model, options.device, path, progress, mesh, options.capture, ahead=ahead
        ) as loading:  # while the weights are on their way, the steps are compiled
            loaded = loading.outline
            self.model, self.config = loaded.model, loaded.config
            self._device = loaded.device
            platform, devices = self._device.platform, loaded.partition.mesh.size
            # Collectives of queued steps can take each other's threads on a CPU, which XLA ends the process for.
            self._wait = platform == "cpu" and devices > 1
            self._cache = loaded.programs
            self._embeds = loaded.embedding is not None
            self.programs = _programs(loaded)
            weights = bytes_per_device(jax.tree.leaves(loaded.params))
            sizing = Sizing(
                self.programs,
                options,
                platform=platform,
                kernel=loaded.attention,
                params=_num_params(loaded),
                weights=weights,
                memory=loading.memory,
                taps=loaded.taps,
                agreed=self._least_of_hosts,
            )
            self.sizes, self._compiled, needed = self._fit(sizing, progress)
            self._layout = {shape: self.programs.layout(shape, self.sizes) for shape in sizing.shapes}
            windows = self.programs.groups.windows
            self._rows = SlotRows(self.sizes.max_num_seqs, self.sizes.pages_per_seq, len(windows))
            self.shapes = tuple(self._layout)
            """Shapes that may be launched: the compiled ones, or with lazy warm-up all."""
            new_state = self._get(self.programs.new_state(self.sizes, by_cpu_kernel=loaded.attention == "cpu"))
            # Compiled ahead, as the steps are: called as it is, jit would compile again for every origin of the state.
            self._bind = self._get(self.programs.bind(self.sizes))
            self._warm_up(options.device.warmup, progress)
            loaded = self._loaded = loading.result()
        self._params = jax.tree.leaves(loaded.params)
        self._state = new_state()
        kv, slots = bytes_per_device(self._state.cache), bytes_per_device(self._state.slots)
        by_kind = {"weights": weights, "kv": kv, "slots": slots, "workspace": needed}
        self.info = EngineInfo(
            model=str(path),
            architecture=self.model.name,
            vocab_size=self.config.vocab,
            max_model_len=self.sizes.max_model_len,
            max_positions=loaded.max_positions,
            max_num_seqs=self.sizes.max_num_seqs,
            max_num_batched_tokens=self.sizes.max_num_batched_tokens,
            page_size=self.sizes.page_size,
            num_pages=self.sizes.num_pages,
            windows=windows,
            dtype=loaded.dtype.name,
            num_params=_num_params(loaded),
            platform=platform,
            attention=loaded.attention,
            priorities=options.schedule.scheduling_policy == "priority",
            device_bytes={kind: size * devices for kind, size in by_kind.items()},
            mesh=str(replace(MeshShape.parse(options.device.mesh or "1"), data=1)),
            embedding=loaded.embedding,
            taps=loaded.taps,
        )
        metrics.device_bytes(self.info.device_bytes)
        if loaded.taps:
            size = captured.token_bytes(loaded.taps) / 2**10
            progress(
                f"capture: {len(loaded.taps)} values, {size:.1f} KiB a token; every position is computed, without "
                "prefix cache and in one decode step a launch"
            )
        gib = 2**30
        held = capacity(windows, self.sizes.num_pages, self.sizes.page_size, self.sizes.max_model_len)
        pages = f"{loaded.kv_dtype.name}, {held}"
        each = f" of each of {devices} devices" if devices > 1 else ""
        progress(
            f"memory{each}: weights {weights / gib:.2f} + KV {kv / gib:.2f} ({pages}) + slots {slots / gib:.2f} "
            f"+ workspace {needed / gib:.2f} = {(weights + kv + slots + needed) / gib:.2f} GiB"
        )
        baked.report(self._cache.directory, self.made_for)

    def made_for(self) -> dict[str, object]:
        """What the programs depend on besides the machine and the code, in figures for people and digests."""
        loaded, sizes = self._loaded, asdict(self.sizes)
        weights = jax.tree.map(lambda a: (a.shape, str(a.dtype)), self.programs.params)
        return {
            "architecture": self.model.name,
            "the model's config": _digest(loaded.config),
            "the weights' shapes and formats": _digest(weights),
            "mesh": self.info.mesh,
            "dtype": loaded.dtype.name,
            "kv_cache_dtype": loaded.kv_dtype.name,
            "attention": loaded.attention,
            "block_size": sizes.pop("page_size"),
            "num_kv_pages": sizes.pop("num_pages"),
            **sizes,
        }

    def launch(self, plan: Plan) -> tuple[Launched | Pooled, int]:
        """Starts a plan's step or steps and returns them with their padding tokens. They run in launch order."""
        bindings = [self._binding(sequence) for sequence in plan.admitted if _needs_binding(sequence)]
        shape = batch.pick(self._launchable(), plan)
        self._rows.update(plan)
        output = self.execute(Launch(shape, self._layout[shape].pack(plan, self._rows), bindings))
        launched = Pooled(plan, output) if self._embeds else Launched(plan, output)
        return launched, shape.tokens * plan.steps - plan.num_computed

    def execute(self, launch: Launch) -> Any:
        """Starts a launch and returns what will be there: a StepOutput, or the pooled rows of a step for embeddings."""
        number = 0 if self._hosts is None else self._hosts.begin(launch)
        for binding in launch.bindings:
            self._state = self._bind(self._state, *binding)
        self._state, output = self.compiled(launch.shape)(self._params, self._state, launch.buffer)
        if self._hosts is not None:
            self._hosts.launched(number, output)
        if self._wait:
            jax.block_until_ready(self._state)
        return output

    def write_pages(self, count: int) -> None:
        """Writes numbers into the first `count` pages of every layer, for measurements of one host's steps: memory that
        was never written is read from the processor's cache."""
        write = self._get(self.programs.write_pages(self.sizes, count))
        self._state = write(self._state)

    def _launchable(self) -> list[Shape] | tuple[Shape, ...]:
        """Of `shapes` those that all hosts have."""
        hosts = self._hosts
        return self.shapes if hosts is None else [shape for shape in self.shapes if hosts.known(shape)]

    def most_steps(self, seqs: int) -> int:
        """How many decode steps a launch of so many sequences may take: 1 until one of several is compiled for them."""
        return self.sizes.decode_steps if any(s.single and s.seqs >= seqs for s in self._launchable()) else 1

    def is_compiled(self, shape: Shape) -> bool:
        return shape in self._compiled

    def compiled(self, shape: Shape) -> jax.stages.Compiled:
        """The step of one of `shapes`, compiled now if it is not yet."""
        return self._compiled.get(shape) or self._compile_now(shape)

    @property
    def params(self) -> Params:
        """The weights as the model file sees them."""
        return self._loaded.params

    def prepare(self, update: Update, params: Params | None = None) -> Prepared:
        """What `update` asks for, or the tree of weights `params`, beside what is served. Threads but the loop's.

        Nothing changes, and the steps that are launched meanwhile wait for nothing. Raises ConfigError and
        CheckpointError; see `update.py`.
        """
        now, options = self._loaded, self._options
        workspace = self.info.device_bytes["workspace"] // now.partition.mesh.size
        if update.code:
            return self._prepare_code(edited(now, options, self._path, workspace, reread=self._reread))
        if params is None:
            path = Path(update.path or self._path)
            loaded = replace(now, params=weights_at(now, options, path, workspace))
            return Prepared(loaded, path, True, self.programs)
        loaded = replace(now, params=weights_of(now, options, params, workspace))
        return Prepared(loaded, self._path, False, self.programs)

    def _prepare_code(self, loaded: Loaded) -> Prepared:
        """Compiles every step that is compiled now. Raises ConfigError for another cache, vocabulary or context."""
        programs, sizes = _programs(loaded), self.sizes
        if programs.state(sizes) != self.programs.state(sizes):
            raise ConfigError(
                "the edited code wants another KV cache: its layers, kv_heads, head_dim or value_dim; restart for it"
            )
        if programs.groups.windows != self.programs.groups.windows:
            raise ConfigError("the edited code has other sliding windows, and with them other pages; restart for it")
        if loaded.config.vocab != self.config.vocab or loaded.config.max_positions < sizes.max_model_len:
            raise ConfigError("the edited code has another vocabulary, or fewer max_positions; restart for it")
        if self._pool is not None:
            self._pool.shutdown(wait=True)  # so that no step of the old code comes later

        def compile_one(shape: Shape) -> jax.stages.Compiled:
            return self._get(programs.step(shape, sizes), "update")

        shapes = list(self._compiled)
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="compile", initializer=give_way) as pool:
            compiled = dict(zip(shapes, pool.map(compile_one, shapes), strict=True))
        return Prepared(loaded, self._path, self._reread, programs, compiled)

    def install(self, prepared: Prepared) -> None:
        """The next step is that of `prepared`. What is in the KV cache is of no use to it. The loop's thread."""
        loaded = self._loaded = prepared.loaded
        self._path, self._reread, self.programs = prepared.path, prepared.reread, prepared.programs
        self._params = jax.tree.leaves(loaded.params)
        if prepared.compiled is not None:
            self.model, self.config, self._compiled = loaded.model, loaded.config, prepared.compiled
            weights = bytes_per_device(self._params) * loaded.partition.mesh.size
            self.info = msgspec.structs.replace(
                self.info,
                num_params=_num_params(loaded),
                device_bytes=self.info.device_bytes | {"weights": weights},
            )
            self._metrics.device_bytes(self.info.device_bytes)

    def _get(self, program: Program, phase: str = "warmup") -> jax.stages.Compiled:
        what, function, arguments, donate, results = program
        start = time.perf_counter()
        kept = self._cache.find(what, function, *arguments, donate=donate, out_shardings=results)
        give_back()
        self._metrics.program(phase, time.perf_counter() - start, compiled=kept.compiled)
        return kept.program

    def _compile(self, shape: Shape, sizes: Sizes, phase: str = "warmup") -> jax.stages.Compiled:
        return self._get(self.programs.step(shape, sizes), phase)

    def _compile_now(self, shape: Shape) -> jax.stages.Compiled:
        self._compiled[shape] = self._compile(shape, self.sizes, "serving")
        return self._compiled[shape]

    def _fit(self, sizing: Sizing, progress: Progress) -> tuple[Sizes, dict[Shape, jax.stages.Compiled], int]:
        """Sizes the KV cache by what the compiled largest step leaves of each device's memory; returns that step too,
        and its workspace."""
        trial = sizing.trial()
        progress("compiling the largest step")
        compiled = self._compile(sizing.largest, trial)
        needed = workspace_of(compiled) + sizing.captured
        found = sizing.fitted(needed)
        if found.num_pages != trial.num_pages:
            compiled = self._compile(sizing.largest, found)
        if found.max_model_len < sizing.length:
            progress(
                f"max_model_len lowered from {sizing.length} to {found.max_model_len}: that is what the KV cache holds"
            )
        return found, {sizing.largest: compiled}, needed

    def _least_of_hosts(self, pages: int) -> int:
        """Hosts have memory of their own, and programs of one size."""
        return pages if self._hosts is None else self._hosts.least(pages)

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
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="compile", initializer=give_way)
        for shape in missing:
            if shape not in first:
                self._pool.submit(self._compile_ahead, shape)
        self._pool.shutdown(wait=False)

    def _compile_ahead(self, shape: Shape) -> None:
        if self._closing or not threading.main_thread().is_alive():  # the interpreter waits for this thread to end
            return
        try:
            compiled = self._compile(shape, self.sizes)
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

    def _binding(self, sequence: Sequence) -> tuple[Any, ...]:
        params = sequence.request.params
        _, history, ids, values, _ = no_binding(self.sizes)
        tokens = sequence.tokens[: len(history)]  # the last one of a prompt that is only scored may have no place
        history[: len(tokens)] = tokens
        bias = params.bias()
        ids[: len(bias)] = list(bias)
        values[: len(bias)] = list(bias.values())
        return np.int32(sequence.slot), history, ids, values, batch.stop_ids(sequence)


def _programs(loaded: Loaded) -> Programs:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), loaded.params)
    pooling = loaded.embedding.pooling if loaded.embedding is not None else None
    return Programs(
        loaded.model, loaded.config, loaded.partition, loaded.kernel, loaded.kv_dtype, shapes, pooling, loaded.taps
    )


def _digest(found: object) -> str:
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()


def _num_params(loaded: Loaded) -> int:
    return sum(math.prod(s.shape) for s in jax.tree.leaves(loaded.model.param_specs(loaded.config)))


def give_way() -> None:
    """Lets the steps go before this thread's work, and before that of the threads it starts."""
    if sys.platform == "linux":  # elsewhere a priority is the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


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


def _logprobs(host: TokenLogprobs, at: tuple[int, ...], top: int) -> Logprobs:
    return Logprobs(
        float(host.logprob[at]),
        int(host.rank[at]),
        tuple(host.top_ids[at][:top].tolist()),
        tuple(host.top_logprobs[at][:top].tolist()),
    )
