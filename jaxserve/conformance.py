"""Finds out whether a model file keeps the rules of model files, with a small model of drawn weights; no engine.

T tokens of a step, S sequences, V vocab
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import attention
from jaxserve.dry_run import Traced, check_sizes, packed, specs_of, trace
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.loading import named_for
from jaxserve.model_code import brief, place
from jaxserve.page_groups import PageGroups
from jaxserve.random_weights import draw_params
from jaxserve.sharding import Partition
from jaxserve.spec import Cache, Model, Params, ParamSpec
from jaxserve.taps import find_taps, listed
from jaxserve.weights import Checkpoint
from jaxserve.weights.load import check_params

MOST_PARAMS = 50_000_000
"""A config with more is not computed with: the checks run a dozen steps in float32 on the CPU."""
TOLERANCE = 1e-3
"""How far logits may be apart that must be equal, relative to the largest; rounding is two orders below."""
STEP = 32
"""T of every step: one shape, so that one program serves all checks."""
SEQS = 4
PAGE = 4
LENGTH = 24
"""Tokens of the prompt that is computed in several ways."""
PIECES = (9, 7, 1, 1, 1, 5)
OTHERS = (11, 1, 7)
"""Lengths of sequences that share a step."""


@dataclass(frozen=True)
class Finding:
    """What one check came to."""

    check: str
    outcome: Literal["ok", "FAIL", "note"]
    """note: not looked into, or right for some models only."""
    detail: str


def check_model(model: Model, hf: Mapping[str, Any] | None, checkpoint: Checkpoint | None = None) -> Iterator[Finding]:
    """The findings, each as soon as it is known. `hf` is a config.json of a small model; of `checkpoint` only names,
    shapes and types are read."""
    if checkpoint is not None:
        yield _checkpoint_fits(model, checkpoint)
        hf = hf or checkpoint.config
    if hf is None:
        yield Finding(
            "config", "FAIL", "there is no config.json to make a Config of: give --checkpoint, or the file EXAMPLE"
        )
        return
    try:
        config = model.config_from_hf(hf)
        check_sizes(model, config)
    except ConfigError as error:
        yield Finding("config", "FAIL", error.message)
        return
    except Exception as error:
        yield Finding("config", "FAIL", f"{place(error)}Config.from_hf: {brief(error)}")
        return
    sizes = ("layers", "width", "heads", "kv_heads", "head_dim", "vocab")
    yield Finding("config", "ok", ", ".join(f"{name} {getattr(config, name)}" for name in sizes))
    try:
        traced = trace(model, config, jnp.float32)
    except ConfigError as error:
        yield Finding("shapes", "FAIL", error.message)
        return
    if not model.causal:
        yield Finding("shapes", "ok", "q, k, v, hidden and cache are as the config says")
        yield Finding("values", "note", "not computed: an encoder's; compare its embeddings with the original's")
        return
    yield Finding("shapes", "ok", "q, k, v, hidden, cache and logits are as the config says; logits are float32")
    found = [
        _layers(traced, model.cache_spec(config).layers),
        _compiles_once(traced),
        _tried("bfloat16", lambda: _trace_bfloat16(model, config), "bfloat16 weights keep bfloat16 activations"),
        _tried(
            "matrices", lambda: _trace_packed(model, config), "only linear, linear_f32 and embed touch matrix() weights"
        ),
        _taps(model, config),
    ]
    yield from found
    specs = jax.tree.leaves(specs_of(model, config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    count = sum(math.prod(spec.shape) for spec in specs)
    if "FAIL" in (found[0].outcome, found[1].outcome):
        yield Finding("values", "note", "not computed before that is mended")
    elif count > MOST_PARAMS:
        yield Finding(
            "values", "note", f"not computed: {count / 1e6:.0f} M parameters are too many; give the file an EXAMPLE"
        )
    elif config.max_positions < 2 * LENGTH:
        yield Finding("values", "note", f"not computed: max_positions {config.max_positions} is below {2 * LENGTH}")
    else:
        with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.default_matmul_precision("highest"):
            found = list(_values(model, config))  # all of them: a generator that rests would leave its settings on
        yield from found


def _tried(check: str, work: Callable[[], object], done: str) -> Finding:
    try:
        work()
    except ConfigError as error:
        return Finding(check, "FAIL", error.message)
    return Finding(check, "ok", done)


def _checkpoint_fits(model: Model, checkpoint: Checkpoint) -> Finding:
    try:
        checkpoint = named_for(model, checkpoint)
        config = model.config_from_hf(checkpoint.config)
        check_params(model, config, checkpoint)
    except (CheckpointError, ConfigError) as error:
        return Finding("checkpoint", "FAIL", error.message)
    except Exception as error:
        return Finding("checkpoint", "FAIL", f"{place(error)}{brief(error)}")
    return Finding("checkpoint", "ok", f"the specs name all {len(checkpoint.names())} tensors, and their shapes fit")


def _layers(traced: Traced, layers: int) -> Finding:
    if None in traced.attended:
        return Finding("layers", "note", "attend is called with a traced layer, so that which ones is not known")
    if sorted(traced.attended) == list(range(layers)):  # type: ignore[type-var]
        return Finding("layers", "ok", f"attend is called once for each of {layers} layers")
    called = ", ".join(map(str, traced.attended)) or "none"
    return Finding(
        "layers",
        "FAIL",
        f"attend is called for layers {called}; it must be once for each of 0 to {layers - 1}: a layer that gives "
        "another's number writes over that one's keys and values, and reads them",
    )


def _compiles_once(traced: Traced) -> Finding:
    found = sorted(set(re.findall(r"\b(?:pure|io|debug)_callback\b|\bdebug_print\b", str(traced.jaxpr))))
    if found:
        return Finding(
            "no callbacks", "FAIL", f"{', '.join(found)} calls Python from each step; take jax.debug and callbacks out"
        )
    return Finding("no callbacks", "ok", "forward and logits run on the device alone")


def _trace_bfloat16(model: Model, config: Any) -> None:
    try:
        with jax.numpy_dtype_promotion("standard"):
            trace(model, config, jnp.bfloat16)
    except ConfigError as error:
        with jax.numpy_dtype_promotion("strict"):  # which stops at the first operation of two types
            try:
                trace(model, config, jnp.bfloat16)
            except ConfigError as strict:
                at, mixed, _ = strict.message.partition(": TypePromotionError")
                if mixed:
                    raise ConfigError(f"{error.message}; bfloat16 first meets another type at {at}") from error
        raise


def _trace_packed(model: Model, config: Any) -> None:
    """As the CPU's kernels have the weights."""

    def leaf(spec: ParamSpec) -> Any:
        if spec.matrix:
            return packed(spec, spec.stored_shape, jnp.float32, jnp.float32)
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32)

    trace(model, config, jnp.float32, leaf)


def _taps(model: Model, config: Any) -> Finding:
    try:
        found = find_taps(model, config, jnp.float32, ["*"])
    except ConfigError as error:  # of names that served another purpose, perhaps
        return Finding("taps", "note", f"not every named value can be captured: {error.message}")
    return Finding("taps", "ok", f"--capture can have {', '.join(listed(tap.name for tap in found))}")


class Steps:
    """A model of drawn weights, run dense, and in steps over a paged cache as the engine runs it.

    `params` are other weights than those drawn; `partition` is where they lie, and how many heads they have there.
    """

    def __init__(self, model: Model, config: Any, params: Params | None = None, partition: Partition | None = None):
        self.config = config = config if partition is None else partition.config
        self._spec = model.cache_spec(config)
        self._params = jax.tree.map(jnp.asarray, params or draw_params(specs_of(model, config)))
        kernel = attention.choose("reference", "cpu")[2]
        if partition is not None:
            kernel = partition.over_heads(kernel)

        def dense(params: Params, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden, _ = model.forward(params, config, tokens, positions, jnp.zeros(()), attention.dense)
            return model.logits(params, config, hidden), model.logits(params, config, hidden[::5])

        def step(
            params: Params,
            tokens: jax.Array,
            positions: jax.Array,
            cache: Cache,
            lens: jax.Array,
            table: jax.Array,
            *where: jax.Array,
        ) -> tuple[jax.Array, Cache]:
            attend = attention.bind(kernel, PageGroups.single(self._spec.layers), [lens], [table], *where)
            with contextlib.nullcontext() if partition is None else partition.tracing():
                hidden, cache = model.forward(params, config, tokens, positions, cache, attend)
                return model.logits(params, config, hidden), cache

        self._dense, self._step, self._partition = jax.jit(dense), jax.jit(step), partition
        self._per_seq = -(-STEP // PAGE)
        self._pages = SEQS * self._per_seq + 1

    def dense(self, tokens: np.ndarray, stretch: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Logits of all tokens [T, V] and of every fifth, without a cache."""
        every, fifth = self._dense(self._params, tokens, np.arange(len(tokens), dtype=np.int32) * stretch)
        return np.asarray(every), np.asarray(fifth)

    def empty(self) -> Any:
        """A cache in which nothing was written, which shows as NaN."""
        cache = jnp.full((self._spec.layers * self._pages, PAGE, self._spec.row), jnp.nan)
        if self._partition is None:
            return cache
        return jax.tree.map(lambda a, there: jax.device_put(a, there.sharding), cache, self._partition.cache(cache))

    def step(self, pieces: list[tuple[int, np.ndarray]], cache: Any, padding: int = 0) -> tuple[list[np.ndarray], Any]:
        """The logits of each sequence's piece: (tokens computed before, new tokens); `padding` fills the step up."""
        tokens = np.full(STEP, padding, np.int32)
        positions, cu = np.zeros(STEP, np.int32), np.zeros(SEQS + 1, np.int32)
        lens = np.zeros(SEQS, np.int32)
        for i, (done, new) in enumerate(pieces):
            here = slice(cu[i], cu[i] + len(new))
            tokens[here], positions[here] = new, np.arange(done, done + len(new))
            lens[i], cu[i + 1 :] = done + len(new), cu[i] + len(new)
        # Pages in an order of their own; the last one is nobody's.
        table = np.arange(SEQS * self._per_seq, dtype=np.int32)[::-1].reshape(SEQS, -1)
        mixed = np.array([0, 0, len(pieces)], np.int32)
        logits, cache = self._step(self._params, tokens, positions, cache, lens, table, cu, mixed)
        return np.split(np.asarray(logits), cu[1 : len(pieces) + 1])[:-1], cache

    def unwritten(self, cache: Any, tokens: int) -> list[int]:
        """Layers whose keys and values of the first sequence are not in the cache."""
        per_layer = np.asarray(cache).reshape(self._spec.layers, self._pages, PAGE, -1)
        first = np.arange(SEQS * self._per_seq)[::-1][: tokens // PAGE]
        return [i for i, layer in enumerate(per_layer) if np.isnan(layer[first]).any()]


def _values(model: Model, config: Any) -> Iterator[Finding]:
    """Stops at the first of the first three that fails: the others would fail for the same reason."""
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, config.vocab, LENGTH).astype(np.int32)
    steps = Steps(model, config)
    try:
        right, fifth = steps.dense(prompt)
        if not np.isfinite(right).all():
            yield Finding("values", "FAIL", "with plain attention the logits are no numbers already")
            return
        yield (
            finding := equal(
                "logits by row", fifth, right[::5], "logits of some rows", "those rows of the logits of all"
            )
        )
        if finding.outcome == "FAIL":
            return
        ((whole,), cache) = steps.step([(0, prompt)], steps.empty())
    except Exception as error:
        yield Finding("values", "FAIL", f"{place(error)}{brief(error)}")
        return
    yield (finding := _cache_kept(steps.unwritten(cache, LENGTH)))
    if finding.outcome == "FAIL":
        return
    reads = not np.array_equal(steps.dense(prompt, stretch=2)[0], right)
    if reads:
        yield Finding("positions", "ok", "the logits depend on `positions`")
    else:
        yield Finding("positions", "note", "forward never reads `positions`: right only for a model without positions")

    mixes = "something other than `attend` looks along T at the other tokens of a step: an average over T, say"
    counts = (
        "forward never reads `positions`, and yet it matters where in the step a token stands: it counts positions "
        "itself, as jnp.arange(T) would; take them from the argument"
    )
    cause = mixes if reads else counts
    what, than = "a prompt through the paged cache, the step filled up with padding", "the same alone, without a cache"
    yield equal("paged is dense", whole, right, what, than, mixes)
    ((padded,), _) = steps.step([(0, prompt)], steps.empty(), padding=config.vocab - 1)
    yield equal("padding", padded, whole, "a step filled up with one token", "filled up with another", mixes)
    chunked, done, cache = [], 0, steps.empty()
    for size in PIECES:
        ((part,), cache) = steps.step([(done, prompt[done : done + size])], cache)
        chunked.append(part)
        done += size
    what = f"a prompt in pieces of {', '.join(map(str, PIECES))} tokens"
    yield equal("chunked is whole", np.concatenate(chunked), whole, what, "in one piece", cause)
    others = [rng.integers(0, config.vocab, size).astype(np.int32) for size in OTHERS]
    alone = [steps.step([(0, tokens)], steps.empty())[0][0] for tokens in others]
    together, _ = steps.step([(0, tokens) for tokens in others], steps.empty())
    what = f"sequences of {', '.join(map(str, OTHERS))} tokens in one step"
    yield equal(
        "batch is alone", np.concatenate(together), np.concatenate(alone), what, "each in a step of its own", cause
    )


def _cache_kept(lost: list[int]) -> Finding:
    if not lost:
        return Finding("cache", "ok", "every layer's keys and values are in the cache that forward returns")
    return Finding(
        "cache",
        "FAIL",
        f"the keys and values of layer {', '.join(map(str, lost))} are not in the cache that forward returns: hand the "
        "cache that each attend returns to the next one, and return the last",
    )


def equal(
    check: str,
    found: np.ndarray,
    right: np.ndarray,
    what: str,
    than: str,
    cause: str = "",
    tolerance: float = TOLERANCE,
) -> Finding:
    """Compares logits [T, V]; `cause` is what makes them differ, most likely."""
    because = f"; {cause}" if cause else ""
    if np.isnan(found).any():
        row = int(np.isnan(found).any(axis=-1).argmax())
        text = f"{what}: the logits of token {row} are NaN: a place of the cache was read that was not written"
        return Finding(check, "FAIL", text + because)
    apart = np.abs(found - right).max(axis=-1) / np.abs(right).max()
    if apart.max() > tolerance:
        row = int((apart > tolerance).argmax())
        text = f"{what}, and {than}: from token {row} on the logits differ, by up to {apart.max():.2g} of the largest"
        return Finding(check, "FAIL", text + because)
    return Finding(check, "ok", f"{what}, and {than}: equal" + (f" to {apart.max():.0e}" if apart.max() else ""))
