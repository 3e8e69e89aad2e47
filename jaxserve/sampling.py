"""From logits to tokens, on the device: every row by its own parameters, every token by its own random numbers.

S rows, V vocab, L tokens of history, B biased ids, E stop ids
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxserve import native
from jaxserve.native import sampling as cpu

HISTORY_BLOCK = 256
LOGPROB_ROWS = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowParams:
    """The sampling parameters of each row of a step, as arrays."""

    temperature: Float[Array, " S"]
    top_k: Int[Array, " S"]
    top_p: Float[Array, " S"]
    min_p: Float[Array, " S"]
    repetition_penalty: Float[Array, " S"]
    presence_penalty: Float[Array, " S"]
    frequency_penalty: Float[Array, " S"]
    seed: UInt[Array, "S 2"]
    """High and low word of the 64-bit seed."""
    position: Int[Array, " S"]
    """The position of the token to sample: the counter of the random numbers."""
    num_prompt: Int[Array, " S"]
    biased: Bool[Array, " S"]
    """The slot's bias list applies."""
    allow_only: Bool[Array, " S"]
    """The slot's bias list is all that may be sampled."""
    ban_stop: Bool[Array, " S"]
    """min_tokens is not reached: the slot's stop ids may not be sampled."""
    logprobs: Bool[Array, " S"]
    """Log-probabilities are wanted."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotState:
    """What a slot remembers between steps; written by the steps themselves and by `bind`."""

    history: Int[Array, "slots L"]
    """Every token of the sequence by position; what was cached or bound is there only if `bind` put it."""
    bias_ids: Int[Array, "slots B"]
    bias_values: Float[Array, "slots B"]
    stop_ids: Int[Array, "slots E"]

    @classmethod
    def empty(cls, slots: int, length: int, biases: int, stops: int) -> "SlotState":
        return cls(
            jnp.zeros((slots, length), jnp.int32),
            jnp.full((slots, biases), -1, jnp.int32),
            jnp.zeros((slots, biases), jnp.float32),
            jnp.full((slots, stops), -1, jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities under the raw model: of the token itself, its rank, and the best ids."""

    logprob: Float[Array, " S"]
    rank: Int[Array, " S"]
    top_ids: Int[Array, "S K"]
    top_logprobs: Float[Array, "S K"]


def bind(
    state: SlotState,
    slot: Int[Array, ""],
    history: Int[Array, " L"],
    bias_ids: Int[Array, " B"],
    bias_values: Float[Array, " B"],
    stop_ids: Int[Array, " E"],
) -> SlotState:
    """Gives a slot to a new sequence. Ids of -1 are unused places."""
    return SlotState(
        state.history.at[slot].set(history),
        state.bias_ids.at[slot].set(bias_ids),
        state.bias_values.at[slot].set(bias_values),
        state.stop_ids.at[slot].set(stop_ids),
    )


def sample(logits: Float[Array, "S V"], rows: RowParams, slots: Int[Array, " S"], state: SlotState) -> Int[Array, " S"]:
    """One token a row: bias and bans, then penalties, then the choice, as vLLM orders them.

    Work that no row of the step asks for is skipped. The first NaN of a row is its best.
    """
    penalised = (rows.repetition_penalty != 1) | (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)

    def adjusted() -> jax.Array:
        x = _when(rows.biased, lambda x: _bias(x, rows, state.bias_ids[slots], state.bias_values[slots]), logits)
        x = _when(rows.ban_stop, lambda x: _ban_stop(x, rows.ban_stop, state.stop_ids[slots]), x)
        return _when(penalised, lambda x: _penalise(x, rows, state.history[slots], penalised), x)

    def choose_by_xla(rows: RowParams) -> jax.Array:
        return _choose(adjusted(), rows)

    def choose_on_cpu(rows: RowParams) -> jax.Array:
        # Where nothing is adjusted the logits are read where they are: a condition that gave logits would copy them.
        changed = (rows.biased | rows.ban_stop | penalised).any()
        return jax.lax.cond(changed, lambda: _choose_on_cpu(adjusted(), rows), lambda: _choose_on_cpu(logits, rows))

    return native.by_platform(choose_on_cpu, choose_by_xla, rows)


def token_logprobs(logits: Float[Array, "S V"], tokens: Int[Array, " S"], top: int) -> TokenLogprobs:
    """Log-probabilities of `tokens` and of the `top` best ids of every row; zeros for tokens of -1, which cost less."""

    def by_xla(logits: jax.Array, tokens: jax.Array) -> TokenLogprobs:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[:, None], axis=-1)  # [S, 1]
        best, ids = jax.lax.top_k(logprobs, top)
        rank = 1 + (logprobs > chosen).sum(axis=-1, dtype=jnp.int32)
        found = TokenLogprobs(chosen[:, 0], rank, ids.astype(jnp.int32), best)
        wanted = tokens >= 0
        return jax.tree.map(lambda a: jnp.where(wanted.reshape(-1, *[1] * (a.ndim - 1)), a, jnp.zeros_like(a)), found)

    def on_cpu(logits: jax.Array, tokens: jax.Array) -> TokenLogprobs:
        return TokenLogprobs(*cpu.token_logprobs(logits, tokens, top))

    return native.by_platform(on_cpu, by_xla, logits, tokens)


def no_logprobs(rows: int, top: int) -> TokenLogprobs:
    """The result where none were asked for."""
    return TokenLogprobs(
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows, top), jnp.int32),
        jnp.zeros((rows, top), jnp.float32),
    )


def prompt_logprobs(
    to_logits: Callable[[Float[Array, "C D"]], Float[Array, "C V"]],
    hidden: Float[Array, "T D"],
    targets: Int[Array, " T"],
    top: int,
) -> TokenLogprobs:
    """Log-probabilities of the token after each token of a step; targets of -1 are not wanted and cost nothing.

    A few rows at a time meet the whole vocabulary, so that memory does not depend on the prompt's length.
    """
    rows = min(LOGPROB_ROWS, hidden.shape[0])
    assert hidden.shape[0] % rows == 0, "token buckets are powers of two"

    def block(i: jax.Array, out: TokenLogprobs) -> TokenLogprobs:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=i * rows, slice_size=rows)
        wanted = cut(targets)

        def compute() -> TokenLogprobs:
            found = token_logprobs(to_logits(cut(hidden)), wanted, top)
            return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, i * rows, 0), out, found)

        return jax.lax.cond((wanted >= 0).any(), compute, lambda: out)

    return jax.lax.fori_loop(0, hidden.shape[0] // rows, block, no_logprobs(hidden.shape[0], top))


def _when(
    rows: Bool[Array, " S"], change: Callable[[jax.Array], jax.Array], logits: Float[Array, "S V"]
) -> Float[Array, "S V"]:
    return jax.lax.cond(rows.any(), change, lambda x: x, logits)


def _penalise(
    logits: Float[Array, "S V"], rows: RowParams, history: Int[Array, "S L"], penalised: Bool[Array, " S"]
) -> Float[Array, "S V"]:
    """Repetition (prompt and output, Keskar et al. 2019), then frequency and presence (output only, OpenAI)."""
    seqs, length = history.shape
    block = min(HISTORY_BLOCK, length)
    history = jnp.pad(history, ((0, 0), (0, -length % block)))
    row = jnp.arange(seqs, dtype=jnp.int32)[:, None]

    def count(i: jax.Array, counts: jax.Array) -> jax.Array:
        at = i * block + jnp.arange(block, dtype=jnp.int32)[None, :]  # [1, block]
        ids = jax.lax.dynamic_slice_in_dim(history, i * block, block, axis=1)  # [S, block]
        live = (at < rows.position[:, None]) & penalised[:, None]
        kind = (at >= rows.num_prompt[:, None]).astype(jnp.int32)  # 0 prompt, 1 output
        return counts.at[kind, row, ids].add(live.astype(jnp.int32), mode="drop")

    blocks = -(-jnp.where(penalised, rows.position, 0).max() // block)
    counts = jax.lax.fori_loop(0, blocks, count, jnp.zeros((2, *logits.shape), jnp.int32))
    seen, said = counts.sum(axis=0) > 0, counts[1]
    penalty = rows.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - rows.frequency_penalty[:, None] * said.astype(jnp.float32)
    return logits - rows.presence_penalty[:, None] * (said > 0).astype(jnp.float32)


def _bias(
    logits: Float[Array, "S V"], rows: RowParams, ids: Int[Array, "S B"], values: Float[Array, "S B"]
) -> Float[Array, "S V"]:
    """Adds each slot's values (-inf bans) and, for rows of allowed ids, leaves nothing else."""
    vocab = logits.shape[-1]
    ids = jnp.where((ids >= 0) & rows.biased[:, None], ids, vocab)  # dropped
    listed = jnp.take_along_axis(logits, jnp.minimum(ids, vocab - 1), axis=-1) + values
    rest = jnp.where((rows.allow_only & rows.biased)[:, None], -jnp.inf, logits)
    return rest.at[jnp.arange(logits.shape[0])[:, None], ids].set(listed, mode="drop")


def _ban_stop(logits: Float[Array, "S V"], ban: Bool[Array, " S"], ids: Int[Array, "S E"]) -> Float[Array, "S V"]:
    ids = jnp.where((ids >= 0) & ban[:, None], ids, logits.shape[-1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].set(-jnp.inf, mode="drop")


def _choose(logits: Float[Array, "S V"], rows: RowParams) -> Int[Array, " S"]:
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = jax.lax.cond((rows.temperature > 0).any(), lambda: _draw(logits, rows), lambda: greedy)
    return jnp.where(rows.temperature > 0, drawn, greedy)


def _choose_on_cpu(logits: Float[Array, "S V"], rows: RowParams) -> Int[Array, " S"]:
    return cpu.sample(logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.position)


def _draw(logits: Float[Array, "S V"], rows: RowParams) -> Int[Array, " S"]:
    """Temperature, then min-p, top-k, top-p, as vLLM orders them; then the Gumbel maximum.

    The noise of (seed, position, id) is added to each id by itself, so no sum over the vocabulary, whose rounding
    could depend on the step, stands between equal logits and equal tokens.
    """
    logits = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    best = logits.max(axis=-1, keepdims=True)

    def by_min_p(x: jax.Array) -> jax.Array:
        floor = best + jnp.log(jnp.maximum(rows.min_p, jnp.finfo(jnp.float32).tiny))[:, None]
        return jnp.where((rows.min_p > 0)[:, None] & (x < floor), -jnp.inf, x)

    def by_top_k(x: jax.Array) -> jax.Array:
        on = (rows.top_k > 0) & (rows.top_k < x.shape[-1])
        floor = _largest(x, lambda kept: kept.sum(axis=-1, dtype=jnp.int32) >= rows.top_k)
        return jnp.where(on[:, None] & (_ordered(x) < floor[:, None]), -jnp.inf, x)

    def by_top_p(x: jax.Array) -> jax.Array:
        weight = jnp.exp(x - best)
        enough = jnp.maximum(rows.top_p, jnp.finfo(jnp.float32).tiny) * weight.sum(axis=-1)  # 0 would be none at all
        floor = _largest(x, lambda kept: jnp.where(kept, weight, 0.0).sum(axis=-1) >= enough)
        return jnp.where((rows.top_p < 1)[:, None] & (_ordered(x) < floor[:, None]), -jnp.inf, x)

    live = rows.temperature > 0
    logits = _when(live & (rows.min_p > 0), by_min_p, logits)
    logits = _when(live & (rows.top_k > 0), by_top_k, logits)
    logits = _when(live & (rows.top_p < 1), by_top_p, logits)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    return jnp.argmax(logits + jax.vmap(noise)(rows.seed, rows.position), axis=-1).astype(jnp.int32)


def _ordered(x: Float[Array, "S V"]) -> UInt[Array, "S V"]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(x: Float[Array, "S V"], enough: Callable[[Bool[Array, "S V"]], Bool[Array, " S"]]) -> UInt[Array, " S"]:
    """The largest threshold (as `_ordered`) such that what is at or above it is `enough`: 32 passes, no sort.

    Exact for any vocabulary, and each pass reads it once; a sort of 150,000 floats costs far more.
    """
    keys = _ordered(x)

    def bit(i: jax.Array, floor: jax.Array) -> jax.Array:
        higher = floor | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(keys >= higher[:, None]), higher, floor)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(x.shape[:1], jnp.uint32))
