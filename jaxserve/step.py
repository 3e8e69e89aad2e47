"""The programs of an engine and what they are compiled for: a launch of steps, its state, and what binds a slot.

Nothing here holds an array or asks for a device: a Partition says where things lie, so that a step can also be compiled
for devices that this machine does not have.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import attention, sampling
from jaxserve.batch import Layout, Shape, StepInput
from jaxserve.native.attention import untouched_cache
from jaxserve.page_groups import PageGroups
from jaxserve.pooling import pool
from jaxserve.request import MAX_BIAS_IDS, MAX_STOP_IDS, MAX_TOP_LOGPROBS, PoolingKind, TapInfo
from jaxserve.sampling import RowParams, SlotState, TokenLogprobs
from jaxserve.sharding import Partition
from jaxserve.spec import Model, Params
from jaxserve.taps import with_values
from kernels_pallas.ragged_paged_attention.contract import Cache, RaggedPagedAttention


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """What every step takes, changes in place and returns."""

    cache: Cache  # [layers of a group * pages, page_size, CacheSpec.row]
    slots: SlotState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What a launch brings back, by row and, for prompts, by token. Of several steps all but prompts has an axis N.

    A token of -1 is none: its sequence ended before that step.
    """

    tokens: jax.Array  # [S] or [N, S]
    logprobs: TokenLogprobs  # [S] or [N, S]
    prompt_logprobs: TokenLogprobs  # [T]
    captured: tuple[jax.Array, ...] = ()  # [T, ...] of each of Programs.taps


@dataclass(frozen=True)
class Sizes:
    """Every number that the options left open, worked out."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    decode_steps: int = 1

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)


class Program(NamedTuple):
    """A function to compile, as `lower` does. `what` names it and all that it depends on besides the arguments, for
    CompileCache.
    """

    what: object
    function: Any
    arguments: tuple[Any, ...]
    donate: int | None
    results: Any

    def lower(self) -> jax.stages.Lowered:
        """Traced for the devices that the arguments' shardings name, which may be only described."""
        donated = () if self.donate is None else self.donate
        return jax.jit(self.function, donate_argnums=donated, out_shardings=self.results).lower(*self.arguments)


@dataclass(frozen=True, eq=False)
class Programs:
    """The programs of one model on one Partition."""

    model: Model
    config: Any
    """The model's own; `partition.config` has the sizes of the arrays."""
    partition: Partition
    kernel: RaggedPagedAttention
    dtype: np.dtype
    """Of the KV cache."""
    params: Params
    """The tree of weights as jax.ShapeDtypeStructs with their shardings."""
    pooling: PoolingKind | None = None
    """What a step makes of the hidden states where embeddings are wanted; None: tokens."""
    taps: tuple[TapInfo, ...] = ()
    """Inner values of the model that a step brings back, one step a launch."""

    def step(self, shape: Shape, sizes: Sizes) -> Program:
        """(list of weights, state, buffer of `Layout`) -> state, StepOutput. The state is donated.

        Where a sequence has one token each and `sizes.decode_steps` are allowed, it takes as many as the buffer says.
        With `pooling` the second result is the sequences' pooled hidden states, float32 [S, D].
        """
        layout = self.layout(shape, sizes)
        sizes = replace(sizes, decode_steps=layout.steps)
        params, tree = jax.tree.flatten(self.params)
        state, everywhere = self.state(sizes), self.partition.everywhere
        buffer = jax.ShapeDtypeStruct((layout.size,), jnp.int32, sharding=everywhere)
        what = ("step", self.config, self.kernel.__module__, self.pooling, self.taps, shape, sizes, tree)
        return Program(
            what, partial(_step, self, tree, layout), (params, state, buffer), 1, (_shardings(state), everywhere)
        )

    def layout(self, shape: Shape, sizes: Sizes) -> Layout:
        """Of the buffer of a step."""
        windows, steps = self.groups.windows, sizes.decode_steps
        return Layout(shape, sizes.pages_per_seq, sizes.max_num_seqs, windows, sizes.page_size, steps)

    @property
    def groups(self) -> PageGroups:
        """The model's layers by what they keep."""
        return self.model.cache_spec(self.partition.config).groups(self.partition.config.max_positions)

    def bind(self, sizes: Sizes) -> Program:
        """(state, *binding) -> state, as `no_binding` has them. The state is donated."""
        state, everywhere = self.state(sizes), self.partition.everywhere
        binding = (jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere) for a in no_binding(sizes))
        return Program("bind", _bind, (state, *binding), 0, _shardings(state))

    def write_pages(self, sizes: Sizes, count: int) -> Program:
        """state -> state, with ones in the first `count` pages of every layer. The state is donated."""
        state = self.state(sizes)

        def write(state: StepState) -> StepState:
            def ones(a: jax.Array) -> jax.Array:
                by_layer = a.reshape(-1, sizes.num_pages, *a.shape[1:])
                return by_layer.at[:, :count].set(1).reshape(a.shape)

            return replace(state, cache=jax.tree.map(ones, state.cache))

        return Program(("write", sizes.num_pages, count), write, (state,), 0, _shardings(state))

    def new_state(self, sizes: Sizes, *, by_cpu_kernel: bool) -> Program:
        """() -> state, before any step; `by_cpu_kernel`: that is the kernel which will read the cache."""
        state = self.state(sizes)
        # As large as the longest context: to clear it takes seconds, and memory that may never be used.
        new_cache = untouched_cache if by_cpu_kernel else jnp.zeros

        def new() -> StepState:
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state.slots)
            return StepState(jax.tree.map(lambda a: new_cache(a.shape, a.dtype), state.cache), zeros)

        return Program(("state", by_cpu_kernel, state), new, (), None, _shardings(state))

    def state(self, sizes: Sizes) -> StepState:
        """The shapes of a step's state, and where it lies."""
        spec = self.model.cache_spec(self.partition.config)
        shapes = attention.cache_shapes(spec, sizes.num_pages, sizes.page_size, self.dtype, self.groups)
        cache = self.partition.cache(shapes)
        slots = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.partition.everywhere),
            slot_shapes(sizes.max_num_seqs, sizes.max_model_len),
        )
        return StepState(cache, slots)


def slot_shapes(seqs: int, length: int) -> SlotState:
    """The shapes of what the slots remember; few bytes unless the context is very long."""
    return jax.eval_shape(lambda: SlotState.empty(seqs + 1, length, MAX_BIAS_IDS, MAX_STOP_IDS))


def no_binding(sizes: Sizes) -> tuple[Any, ...]:
    """What `bind` takes after the state, for nobody's slot: slot, history, bias ids and values, stop ids."""
    return (
        np.int32(sizes.max_num_seqs),
        np.zeros(sizes.max_model_len, np.int32),
        np.full(MAX_BIAS_IDS, -1, np.int32),
        np.zeros(MAX_BIAS_IDS, np.float32),
        np.full(MAX_STOP_IDS, -1, np.int32),
    )


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, tree)


def _bind(state: StepState, *binding: jax.Array) -> StepState:
    return StepState(state.cache, sampling.bind(state.slots, *binding))


def _step(
    programs: Programs, tree: Any, layout: Layout, params: list[jax.Array], state: StepState, buffer: jax.Array
) -> tuple[StepState, StepOutput | jax.Array]:
    with programs.partition.tracing():
        step = programs.partition.whole(layout.unpack(buffer))
        one = partial(_whole_step, programs, jax.tree.unflatten(tree, params), layout)
        if layout.steps == 1:
            return one(state, step)
        return _decode_loop(one, layout, _top(programs), state, step)


class _Loop(NamedTuple):
    """What the steps of a launch hand on."""

    done: jax.Array  # steps
    live: jax.Array  # [S]
    got: jax.Array  # [S], tokens that each sequence has got
    last: jax.Array  # [S], the last of them
    state: StepState
    tokens: jax.Array  # [N, S]
    logprobs: TokenLogprobs  # [N, S]


def _decode_loop(
    one: Callable[[StepState, StepInput], tuple[StepState, Any]],
    layout: Layout,
    top: int,
    state: StepState,
    step: StepInput,
) -> tuple[StepState, StepOutput]:
    """Up to layout.steps steps of one token a sequence, until each has taken its `steps` or has sampled a stop id.

    A sequence that has ended computes its last position again, to the same keys and values. A stop id is left where
    the next launch looks for its first token: that was planned before the host knew, and finds the sequence ended.
    """
    assert step.steps is not None
    steps, first, size = step.steps, step.kv_lens - 1, (layout.steps, layout.shape.seqs)

    def body(c: _Loop) -> _Loop:
        after = jnp.where(c.live, c.done, jnp.maximum(c.got - 1, 0))
        now = replace(step.after(after), samples=jnp.where(c.live, step.samples, 0))
        state, out = one(c.state, now)
        tokens = jnp.where(c.live, out.tokens, -1)
        got = jnp.where(c.live, c.done + 1, c.got)
        return _Loop(
            c.done + 1,
            c.live & (got < steps) & ~step.stopped(tokens, now.kv_lens),
            got,
            jnp.where(c.live, tokens, c.last),
            state,
            c.tokens.at[c.done].set(tokens),
            jax.tree.map(lambda all, new: all.at[c.done].set(new), c.logprobs, out.logprobs),
        )

    known = jnp.where(step.tokens >= 0, step.tokens, state.slots.history.at[step.slots, first].get(mode="clip"))
    live = (steps > 0) & ~step.stopped(known, first)
    logprobs = jax.tree.map(lambda a: a.reshape(*size, *a.shape[1:]), sampling.no_logprobs(size[0] * size[1], top))
    begin = _Loop(jnp.int32(0), live, jnp.zeros_like(steps), known, state, jnp.full(size, -1, jnp.int32), logprobs)
    c = jax.lax.while_loop(lambda c: c.live.any(), body, begin)
    history = _remember(c.state.slots.history, step.slots, jnp.maximum(first + steps, 0), c.last)
    state = StepState(c.state.cache, replace(c.state.slots, history=history))
    return state, StepOutput(c.tokens, c.logprobs, sampling.no_logprobs(0, top))


def _whole_step(
    programs: Programs, weights: Params, layout: Layout, state: StepState, step: StepInput
) -> tuple[StepState, StepOutput | jax.Array]:
    """One step, whole: resolve tokens, forward, logits of the last rows, sample, remember; or forward and pool."""
    model, partition = programs.model, programs.partition
    config = partition.config
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
    tokens = jnp.where(live, tokens, -1)

    with jax.named_scope("forward"):
        kernel, groups = partition.over_heads(programs.kernel), programs.groups
        kv_lens = [step.kv_lens if begin is None else step.kv_lens - begin for begin in step.kv_begins]
        attend = attention.bind(kernel, groups, kv_lens, step.page_tables, step.cu_q_lens, step.distribution)
        captured: tuple[jax.Array, ...] = ()
        if programs.taps:

            def forward(tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
                return model.forward(weights, config, tokens, positions, cache, attend)

            hidden, cache, captured = with_values(forward, programs.taps, tokens, positions, state.cache)
            captured = partition.whole(captured)
        else:
            hidden, cache = model.forward(weights, config, tokens, positions, state.cache, attend)
    if programs.pooling is not None:
        with jax.named_scope("pool"):
            pooled = partition.whole(pool(hidden, step.cu_q_lens, programs.pooling))
        return StepState(cache, replace(state.slots, history=history)), pooled
    somebody = jnp.arange(seqs) < step.distribution[2]  # rows of nobody are zeros, as those of hidden are on CPU
    last = jnp.where(somebody[:, None], hidden[jnp.clip(step.cu_q_lens[1:] - 1, 0, size - 1)], 0)  # [S, D]
    slots = replace(state.slots, history=history)

    def to_logits(hidden: jax.Array) -> jax.Array:
        with jax.named_scope("logits"):
            return partition.by_token(model.logits(weights, config, hidden))

    sample = partial(_sample, partition, to_logits, programs.config.vocab, _top(programs), last, step, slots)
    # Of a step of prompts most rows may be nobody's, and a row of logits can cost as much as a token's whole forward.
    counts = [seqs] if layout.shape.single else [n for n in (seqs // 16, seqs // 4) if n >= 4] + [seqs]
    enough = jnp.sum(step.distribution[2] > jnp.array(counts[:-1], jnp.int32))
    sampled, logprobs = jax.lax.switch(enough, [partial(sample, n) for n in counts])
    with jax.named_scope("sample"):
        if layout.shape.single:
            prompt = sampling.no_logprobs(0, _top(programs))
        else:

            def whole_logits(hidden: jax.Array) -> jax.Array:
                return partition.whole(to_logits(hidden))[:, : programs.config.vocab]

            prompt = sampling.prompt_logprobs(whole_logits, hidden, step.targets, _top(programs))
    target = jnp.where(step.samples > 0, step.slots, layout.num_slots)
    history = _remember(history, target, step.rows.position, sampled)
    return StepState(cache, replace(slots, history=history)), StepOutput(sampled, logprobs, prompt, captured)


def _top(programs: Programs) -> int:
    """How many of the best ids come with a token's log-probability."""
    return min(MAX_TOP_LOGPROBS, programs.config.vocab)


def _sample(
    partition: Partition,
    to_logits: Callable[[jax.Array], jax.Array],
    vocab: int,
    top: int,
    last: jax.Array,
    step: StepInput,
    slots: SlotState,
    count: int,
) -> tuple[jax.Array, TokenLogprobs]:
    """Tokens [S] and log-probabilities of the first `count` rows of `last`, [S, D]; the others are zero."""

    def choose(rows: tuple[jax.Array, RowParams, jax.Array], slots: SlotState) -> tuple[jax.Array, TokenLogprobs]:
        logits, params, slot = rows
        logits = logits[:, :vocab]  # without what the vocabulary was filled up with to be divided
        sampled = sampling.sample(logits, params, slot, slots)
        logprobs = jax.lax.cond(
            params.logprobs.any(),
            lambda: sampling.token_logprobs(logits, jnp.where(params.logprobs, sampled, -1), top),
            lambda: sampling.no_logprobs(logits.shape[0], top),
        )
        return sampled, logprobs

    # Else XLA divides the arrays before it cuts them, and then has to move each one's numbers between devices.
    rows = partition.whole(jax.tree.map(lambda a: a[:count], (step.rows, step.slots)))
    logits = to_logits(last[:count])  # [count, V]
    with jax.named_scope("sample"):
        found = partition.whole(partition.by_rows(choose, (logits, *rows), slots))
    rest = last.shape[0] - count
    return jax.tree.map(lambda a: jnp.pad(a, [(0, rest)] + [(0, 0)] * (a.ndim - 1)), found)


def _remember(history: jax.Array, slot: jax.Array, position: jax.Array, token: jax.Array) -> jax.Array:
    """Writes each token to its place; those of no sequence go to the last slot, which is nobody's."""
    if token.size == 1:  # XLA makes a scatter of one row a select over a copy of everything
        return jax.lax.dynamic_update_slice(history, token[None], (slot[0], position[0]))
    return history.at[slot, position].set(token, mode="drop")
