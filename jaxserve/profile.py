"""Times single compiled steps, without scheduler and HTTP, and tells from a profile which operations hold the time."""

import itertools
import os
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve import batch
from jaxserve.bench import row
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.page_groups import first_block
from jaxserve.pages import GIVEN_UP
from jaxserve.plans import Plan, Row, Sequence
from jaxserve.request import Request, SamplingParams
from jaxserve.runner import Runner
from jaxserve.spec import Params

STEP = "jaxserve step"
"""The span of a step in the profile."""


@dataclass(frozen=True)
class Case:
    """A step: `seqs` sequences with `context` tokens each in the KV cache, which get `tokens` more each."""

    seqs: int
    tokens: int
    context: int

    def __str__(self) -> str:
        what = f"decode {self.seqs}" if self.tokens == 1 else f"prefill {self.tokens}"
        return f"Step: {what}, context {self.context}"

    def plan(self, runner: Runner, seed: int = 0) -> Plan:
        """The step of greedy sequences of random tokens. Raises ConfigError for what the engine would never plan."""
        sizes, length = runner.sizes, self.context + self.tokens
        windows, blocks = runner.info.windows, -(-length // sizes.page_size)
        firsts = [first_block(self.context, window, sizes.page_size) for window in windows]
        for wanted, most, name, flag in (
            (self.seqs, sizes.max_num_seqs, "batch_size", "max_num_seqs"),
            (self.seqs * self.tokens, sizes.max_num_batched_tokens, "prefill", "max_num_batched_tokens"),
            (length, sizes.max_model_len, "context and the step's own tokens:", "max_model_len"),
            (
                self.seqs * sum(blocks - first for first in firsts),
                sizes.num_pages,
                "pages of KV cache needed:",
                "num_kv_pages",
            ),
        ):
            if wanted > most:
                cure = f"lower it, or raise --{flag.replace('_', '-')}"
                raise ConfigError(f"{name} {wanted} exceeds {flag} {most}; {cure}")
        rng, params = np.random.default_rng(seed), SamplingParams(temperature=0.0, seed=seed)
        sequences, pages = [], itertools.count()
        for i in range(self.seqs):
            ids = rng.integers(0, runner.info.vocab_size, length).tolist()
            request = Request(id=str(i), prompt_token_ids=tuple(ids), params=params)
            sequence = Sequence(request, 0, i, 0.0, ids, length, length + 1, slot=i)
            sequence.pages = [[GIVEN_UP] * first + [next(pages) for _ in range(first, blocks)] for first in firsts]
            sequences.append(sequence)
        rows = [Row(s, s.slot, self.context, self.tokens, True) for s in sequences]
        return Plan(rows, self.seqs if self.tokens == 1 else 0, self.seqs * self.tokens, sequences)


@dataclass(frozen=True)
class Timing:
    """Steps of a case, one after the other, each from its launch until its tokens are on the host."""

    case: Case
    shape: batch.Shape
    seconds: tuple[float, ...]
    weight_bytes: int

    def table(self) -> str:
        median = float(np.median(self.seconds))
        rows = (
            ("Compiled shape, tokens x sequences:", f"{self.shape.tokens} x {self.shape.seqs}"),
            ("Fastest step (ms):", 1e3 * min(self.seconds)),
            ("Median step (ms):", 1e3 * median),
            ("Tokens/s at the median:", self.case.seqs * self.case.tokens / median),
            ("Weights read a step (MB):", self.weight_bytes / 1e6),
            ("Weights read at the median (GB/s):", self.weight_bytes / 1e9 / median),
        )
        lines = (f"{label:<40} {value}" if isinstance(value, str) else row(label, value) for label, value in rows)
        return "\n".join([f"{f' {self.case} ':=^60}", *lines])


@dataclass(frozen=True)
class Part:
    """Operations of one kind in one part of the model: how many a step, and their time."""

    where: str
    operation: str
    calls: float
    ms: float


@dataclass(frozen=True)
class Breakdown:
    """Where the time of profiled steps went: the parts' times add up to `ms`, the mean of the `steps` that count."""

    parts: tuple[Part, ...]
    ms: float
    steps: int

    def table(self) -> str:
        line = "{:<12} {:<34} {:>7} {:>9} {:>6}".format
        whole = Part("whole step", "", 0, sum(p.ms for p in self.parts))
        rows = (
            line(
                p.where, p.operation, f"{p.calls:.4g}" if p.calls else "", f"{p.ms:.3f}", f"{100 * p.ms / self.ms:.1f}"
            )
            for p in (*self.parts, whole)
        )
        note = (
            f"Mean of {self.steps} profiled steps, the faster half. What runs at once shares the time in equal parts."
        )
        return "\n".join([note, line("part", "operation", "calls", "ms", "%"), *rows])


def measure(runner: Runner, case: Case, *, steps: int, warm: int) -> Timing:
    """Times `steps` steps, after the first, which may compile, and `warm` more. Raises ConfigError."""
    run = _Repeat(runner, case)
    for _ in range(warm):
        run()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return Timing(case, run.shape, tuple(seconds), weights_read(runner.params))


def profile(runner: Runner, case: Case, *, steps: int) -> Breakdown:
    """The breakdown of the faster half of `steps` steps. They are slower than others by what the profiler costs.

    Raises ConfigError for the case, JaxserveError where the platform's profiles name no operations.
    """
    run = _Repeat(runner, case)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            for _ in range(steps):
                with jax.profiler.TraceAnnotation(STEP):
                    run()
        (file,) = Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    known = instructions(runner.compiled(run.shape).as_text() or "", weight_names(runner.params))
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # jaxlib's own, about its types
        return breakdown(data, known)


class _Repeat:
    """Runs the same step again and again; a sequence's own state does not change by it."""

    def __init__(self, runner: Runner, case: Case):
        self._runner, self._plan = runner, case.plan(runner)
        runner.write_pages(sum(len(pages) - pages.count(GIVEN_UP) for s in self._plan.admitted for pages in s.pages))
        self.shape = batch.pick(runner.shapes, self._plan)
        self()
        self._plan.admitted.clear()  # as in the steps after a sequence's first

    def __call__(self) -> None:
        self._runner.launch(self._plan)[0].result()


def weights_read(params: Params) -> int:
    """Bytes of the weights that a step reads whole: all but an embedding that is not the output's matrix too."""
    return _bytes(params) - (_bytes(params["embed"]) if "unembed" in params else 0)


def weight_names(params: Params) -> list[str]:
    """The part of the model that multiplies each weight, in the order of the compiled step's arguments."""
    paths = (path for path, _ in jax.tree.leaves_with_path(params))
    names = ([key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1] for path in paths)
    return ["logits" if name in ("embed", "unembed") else name for name in names]


def _bytes(tree: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def memory_bandwidth(nbytes: int = 2**28, rounds: int = 5) -> float:
    """Bytes a second that all cores together read of main memory, the best round's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pieces = np.array_split(np.ones(nbytes // 4, np.int32), cores)
    with ThreadPoolExecutor(cores) as pool:
        best = float("inf")
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(np.max, pieces))
            best = min(best, time.perf_counter() - start)
    return nbytes / best


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:.*?\s)?([a-z][\w\-]*)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OPERAND = re.compile(r"%?([\w.\-]+)[,)]")
_WEIGHT = re.compile(r"params\[(\d+)\]")
_SCOPE = re.compile(r"[A-Za-z_]\w*")
# What JAX puts between the scopes of an operation's name: `jit(_step)/forward/cond/branch_0_fun/norm/rsqrt`.
_NO_SCOPE = re.compile(r"cond|while|body|branch_\d+_fun|closed_call|eval_jaxpr")


def instructions(text: str, weights: Seq[str]) -> dict[str, tuple[str, str]]:
    """(part of the model, operation) of each instruction of a compiled program's text.

    The part is the innermost of the program's named scopes; a fusion counts where its last operation does. Where XLA
    has lost the name, as it does of products of one row, the part is the weight that is an operand.
    """
    found: dict[str, tuple[str, str]] = {}
    weight: dict[str, str] = {}
    for line in text.splitlines():
        if not (match := _INSTRUCTION.match(line)):
            continue
        target, named = _TARGET.search(line), _OP_NAME.search(line)
        name = named[1] if named else ""
        if argument := _WEIGHT.fullmatch(name):
            weight[match[1]] = weights[int(argument[1])]
        scopes = [s for s in name.split("/")[:-1] if _SCOPE.fullmatch(s) and not _NO_SCOPE.fullmatch(s)]
        operands = () if name else _OPERAND.findall(line[match.end() :])
        part = scopes[-1] if scopes else next((weight[o] for o in operands if o in weight), "other")
        found[match[1]] = (part, target[1] if target else match[2])
    return found


type _Span = tuple[float, float, str]
"""Start and end in ns, and the instruction."""


def breakdown(data: jax.profiler.ProfileData, known: dict[str, tuple[str, str]]) -> Breakdown:
    """Shares out the time of the spans named STEP: among the operations that run at a moment, in equal parts.

    The faster half of the spans counts, since another program on a core makes one many times slower. An operation that
    runs others, as a condition does, counts only while none of them runs on its thread. What is left is `between`
    operations, where XLA passes from one to the next, and the `host`'s: the launch, before the first of them, and the
    result, after the last.
    """
    steps, threads = [], []
    for plane in data.planes:
        for line in plane.lines:
            spans: list[_Span] = []
            for event in line.events:
                if event.name == STEP:
                    steps.append((event.start_ns, event.end_ns))
                elif name := _instruction(plane.name, event, known):
                    spans.append((event.start_ns, event.end_ns, name))
            if spans:
                threads.append(spans)
    if not steps or not threads:
        raise JaxserveError("the profile of this platform does not name the operations of a step")
    steps = sorted(steps, key=lambda step: step[1] - step[0])[: (len(steps) + 1) // 2]
    calls: Counter[tuple[str, str]] = Counter()
    ns: dict[tuple[str, str], float] = defaultdict(float)
    pieces = sorted(piece for spans in threads for piece in innermost(spans))
    for begin, end in steps:
        calls.update(known[name] for spans in threads for start, _, name in spans if begin <= start < end)
        inside = [(max(a, begin), min(b, end), name) for a, b, name in pieces if a < end and b > begin]
        first, last = min((a for a, _, _ in inside), default=end), max((b for _, b, _ in inside), default=end)
        ns["host", "launch"] += first - begin
        ns["host", "result"] += end - last
        for length, running in concurrent(inside):
            for name in running:
                ns[known[name]] += length / len(running)
            if not running:
                ns["between", "operations"] += length
    count = len(steps)
    parts = (Part(*key, calls[key] / count, time / count / 1e6) for key, time in ns.items())
    total = sum(end - begin for begin, end in steps) / count / 1e6
    return Breakdown(tuple(sorted(parts, key=lambda p: -p.ms)), total, count)


def _instruction(plane: str, event: Any, known: dict[str, tuple[str, str]]) -> str | None:
    """The instruction that an event of the profile is, if it is one."""
    stats = dict(event.stats)
    name = stats.get("hlo_op")
    if name is None and plane.startswith("/device:"):  # named by its text there, `%fusion.3 = ...`, or by its name
        name = event.name.split(" = ")[0].lstrip("%")
    return name if name in known else None


def innermost(spans: Iterable[_Span]) -> Iterator[_Span]:
    """Cuts one thread's nested spans into pieces in which one of them is the innermost."""
    open_: list[tuple[float, str]] = []  # end, instruction
    at = 0.0

    def close(until: float) -> Iterator[_Span]:
        nonlocal at
        while open_ and open_[-1][0] <= until:
            end, name = open_.pop()
            if end > at:
                yield at, end, name
                at = end

    for start, end, name in sorted(spans, key=lambda s: (s[0], -s[1])):
        yield from close(start)
        if open_ and start > at:
            yield at, start, open_[-1][1]
        at = max(at, start)
        open_.append((min(end, open_[-1][0]) if open_ else end, name))
    yield from close(float("inf"))


def concurrent(pieces: Iterable[_Span]) -> Iterator[tuple[float, list[str]]]:
    """(length, the instructions that run all through it) of every stretch from the first start to the last end."""
    edges = sorted((at, begins, name) for a, b, name in pieces for at, begins, name in ((a, 1, name), (b, -1, name)))
    running: Counter[str] = Counter()
    at = edges[0][0] if edges else 0.0
    for edge, begins, name in edges:
        if edge > at:
            yield edge - at, list(running.elements())
            at = edge
        running[name] += begins
