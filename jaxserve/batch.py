"""From a plan to the arrays of a step, and back from the one packed buffer on the device; the only home of shapes.

A step's shape is (T tokens, S sequences). Everything else that varies is data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxserve.sampling import RowParams
from jaxserve.scheduler import Plan, Row

GREEDY_BELOW = 1e-5
LEAST_TOP_P = 1e-6
"""What float32 can still divide by and tell apart; vLLM draws the line for temperature at the same place."""


@dataclass(frozen=True, order=True)
class Shape:
    """T tokens and S sequences; where T == S every sequence has one token."""

    tokens: int
    seqs: int

    @property
    def single(self) -> bool:
        return self.tokens == self.seqs


def shapes(max_num_seqs: int, max_num_batched_tokens: int, least: int) -> list[Shape]:
    """Every shape that `pick` can give, smallest first: what warm-up must compile.

    Steps of one token a sequence come in powers of two from `least`, mixed ones in powers of four.
    """
    seqs = max(least, _power_of_two(max_num_seqs))
    budget = max(_power_of_two(max_num_batched_tokens), 2 * seqs)
    mixed = {Shape(t, min(t // 4, seqs)) for t in _powers(32, budget, 4)[:-1]} | {Shape(budget, seqs)}
    return sorted({Shape(n, n) for n in _powers(least, seqs, 2)} | mixed)


def pick(known: Sequence[Shape], plan: Plan) -> Shape:
    """The smallest of the known shapes that holds the plan."""
    single = plan.num_single == len(plan.rows) and not any(_targets(row) for row in plan.rows)
    fits = (s for s in known if s.seqs >= len(plan.rows) and s.tokens >= plan.num_tokens and (single or not s.single))
    return min(fits)


def covering(known: Sequence[Shape]) -> list[Shape]:
    """The shape that can serve anything, and the one that serves a lone user fast."""
    return [max(known), min(known)]


@flax.struct.dataclass
class StepInput:
    """A step's arrays on the device."""

    tokens: Int[Array, " T"]
    """-1 where only the device knows the token: the slot's history has it."""
    targets: Int[Array, " T"]
    """The token after each token where its log-probability is wanted, else -1."""
    kv_lens: Int[Array, " S"]
    cu_q_lens: Int[Array, " S1"]
    distribution: Int[Array, " 3"]
    page_table: Int[Array, "S B"]
    slots: Int[Array, " S"]
    """Slot of each sequence; rows of no sequence have the one after all sequences' slots."""
    samples: Int[Array, " S"]
    """1 where the sampled token counts."""
    rows: RowParams


_INTS = ("top_k", "position", "num_prompt", "biased", "allow_only", "ban_stop", "logprobs")
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_BOOLS = ("biased", "allow_only", "ban_stop", "logprobs")


class Layout:
    """Where each array of a shape lies in the step's one int32 buffer; one transfer a step is cheaper than twenty."""

    def __init__(self, shape: Shape, pages_per_seq: int, num_slots: int):
        self.shape, self.pages_per_seq, self.num_slots = shape, pages_per_seq, num_slots
        t, s = shape.tokens, shape.seqs
        sizes = {
            "tokens": (t,),
            "targets": (t,),
            "kv_lens": (s,),
            "cu_q_lens": (s + 1,),
            "distribution": (3,),
            "page_table": (s, pages_per_seq),
            "slots": (s,),
            "samples": (s,),
            "seed": (s, 2),
            **{name: (s,) for name in _INTS + _FLOATS},
        }
        self._fields: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        end = 0
        for name, size in sizes.items():
            start, end = end, end + int(np.prod(size))
            self._fields[name] = (start, end, size)
        self.size = end

    def pack(self, plan: Plan) -> np.ndarray:
        """The plan's buffer, int32 [size]."""
        buffer = np.zeros(self.size, np.int32)
        view = {name: buffer[a:b].reshape(size) for name, (a, b, size) in self._fields.items()}
        for name in _FLOATS:
            view[name] = view[name].view(np.float32)
        view["seed"] = view["seed"].view(np.uint32)
        view["targets"].fill(-1)
        view["slots"].fill(self.num_slots)
        view["repetition_penalty"].fill(1.0)
        view["top_p"].fill(1.0)
        view["cu_q_lens"].fill(plan.num_tokens)
        view["distribution"][:] = (plan.num_single, plan.num_single, len(plan.rows))
        at = 0
        for i, row in enumerate(plan.rows):
            self._pack_row(view, i, row, at)
            at += row.count
        return buffer

    def _pack_row(self, view: dict[str, np.ndarray], i: int, row: Row, at: int) -> None:
        sequence, params, end = row.sequence, row.sequence.request.params, row.start + row.count
        known = sequence.tokens[row.start : end]
        view["tokens"][at : at + row.count] = known if len(known) == row.count else [*known, -1]
        targets = _targets(row)
        view["targets"][at : at + len(targets)] = targets
        view["cu_q_lens"][i] = at
        view["kv_lens"][i] = end
        view["page_table"][i, : len(sequence.pages)] = sequence.pages
        view["slots"][i] = row.slot
        view["samples"][i] = row.last
        assert params.seed is not None, "the engine gives every request a seed"
        seed = params.seed + sequence.index
        view["seed"][i] = ((seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF)
        view["position"][i] = end
        view["num_prompt"][i] = sequence.num_prompt
        view["temperature"][i] = params.temperature if params.temperature >= GREEDY_BELOW else 0.0
        view["top_k"][i] = params.top_k
        view["top_p"][i] = max(params.top_p, LEAST_TOP_P)
        view["min_p"][i] = params.min_p
        view["repetition_penalty"][i] = params.repetition_penalty
        view["presence_penalty"][i] = params.presence_penalty
        view["frequency_penalty"][i] = params.frequency_penalty
        view["biased"][i] = bool(params.logit_bias or params.banned_token_ids or params.allowed_token_ids)
        view["allow_only"][i] = params.allowed_token_ids is not None
        view["ban_stop"][i] = 0 <= end - sequence.num_prompt < params.min_tokens
        view["logprobs"][i] = params.logprobs is not None

    def unpack(self, buffer: Int[Array, " size"]) -> StepInput:
        """The same arrays, cut out of the buffer on the device."""
        view = {name: buffer[a:b].reshape(size) for name, (a, b, size) in self._fields.items()}
        for name in _FLOATS:
            view[name] = jax.lax.bitcast_convert_type(view[name], jnp.float32)
        for name in _BOOLS:
            view[name] = view[name] != 0
        view["seed"] = jax.lax.bitcast_convert_type(view["seed"], jnp.uint32)
        rows = RowParams(seed=view.pop("seed"), **{name: view.pop(name) for name in _INTS + _FLOATS})
        return StepInput(rows=rows, **view)


def _targets(row: Row) -> list[int]:
    """The prompt tokens that follow each token of the row, where their log-probabilities are wanted."""
    sequence = row.sequence
    if sequence.prompt_logprobs is None:
        return []
    return sequence.tokens[row.start + 1 : min(row.start + row.count + 1, sequence.num_prompt)]


def _powers(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... and `last` itself."""
    out = []
    while first < last:
        out.append(first)
        first *= factor
    return [*out, last]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
