"""From a plan to the arrays of a step, and back from the one packed buffer on the device; the only home of shapes.

A step's shape is (T tokens, S sequences). Everything else that varies is data.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxserve.plans import Plan, Sequence
from jaxserve.request import MAX_STOP_IDS
from jaxserve.sampling import RowParams
from kernels_pallas.ragged_paged_attention.contract import aligned

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


def shapes(max_num_seqs: int, max_num_batched_tokens: int, least: int, *, singles: bool = True) -> list[Shape]:
    """Every shape that `pick` can give, smallest first: what warm-up must compile.

    Steps of one token a sequence come in powers of two from `least`, mixed ones in powers of four. Without `singles`
    there are only the latter, which hold single tokens as well: enough where nothing is generated.
    """
    seqs = max(least, _power_of_two(max_num_seqs))
    budget = max(_power_of_two(max_num_batched_tokens), 2 * seqs)
    mixed = {Shape(t, min(t // 4, seqs)) for t in _powers(32, budget, 4)[:-1]} | {Shape(budget, seqs)}
    return sorted({Shape(n, n) for n in _powers(least, seqs, 2) if singles} | mixed)


def pick(known: Seq[Shape], plan: Plan) -> Shape:
    """The smallest of the known shapes that holds the plan."""
    single = plan.num_single == len(plan.rows) and not any(row.scored for row in plan.rows)
    several = plan.steps > 1
    holds = (s for s in known if s.seqs >= len(plan.rows) and s.tokens >= plan.num_tokens)
    return min(s for s in holds if (single or not s.single) and (s.single or not several))


def covering(known: Seq[Shape]) -> list[Shape]:
    """The shape that can serve anything, and those that serve a lone user fast: the answer's and a short prompt's."""
    return [max(known), min(known), min(s for s in known if not s.single)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInput:
    """A step's arrays on the device."""

    tokens: Int[Array, " T"]
    """-1 where only the device knows the token: the slot's history has it."""
    targets: Int[Array, " T"]
    """The token after each token where its log-probability is wanted, else -1."""
    kv_lens: Int[Array, " S"]
    cu_q_lens: Int[Array, " S1"]
    distribution: Int[Array, " 3"]
    page_tables: tuple[Int[Array, "S B"], ...]
    """One for each group of layers. Those of groups with a window may begin further on in a sequence, see kv_begins."""
    kv_begins: tuple[Int[Array, " S"] | None, ...]
    """The position of each sequence at which each page table begins; None: they all begin at 0."""
    slots: Int[Array, " S"]
    """Slot of each sequence; rows of no sequence have the one after all sequences' slots."""
    samples: Int[Array, " S"]
    """1 where the sampled token counts."""
    min_tokens: Int[Array, " S"]
    rows: RowParams
    steps: Int[Array, " S"] | None = None
    """Of a launch of several steps: how many each sequence takes unless it ends before."""
    stop_ids: Int[Array, "S E"] | None = None
    """Of the same: the ids that end it, -1 in unused places."""

    def after(self, done: Int[Array, " S"]) -> "StepInput":
        """The same for `done` decode steps later."""
        kv_lens = self.kv_lens + done
        ban_stop = _ban_stop(kv_lens, self.rows.num_prompt, self.min_tokens)
        tokens = jnp.where(done > 0, -1, self.tokens)
        return replace(
            self, tokens=tokens, kv_lens=kv_lens, rows=replace(self.rows, position=kv_lens, ban_stop=ban_stop)
        )

    def stopped(self, tokens: Int[Array, " S"], position: Int[Array, " S"]) -> Bool[Array, " S"]:
        """Whether each token, at its position, ends its sequence: what Scheduler.commit will find, too."""
        assert self.stop_ids is not None
        said = position + 1 - self.rows.num_prompt
        return (self.stop_ids == tokens[:, None]).any(axis=-1) & (said >= jnp.maximum(self.min_tokens, 1))


def _ban_stop(
    position: Int[Array, " S"], num_prompt: Int[Array, " S"], min_tokens: Int[Array, " S"]
) -> Bool[Array, " S"]:
    said = position - num_prompt
    return (said >= 0) & (said < min_tokens)


_INTS = ("top_k", "num_prompt", "min_tokens", "biased", "allow_only", "logprobs")
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_BOOLS = ("biased", "allow_only", "logprobs")
_COLUMNS = (*_INTS, *_FLOATS, "seed")  # the seed has two
_WIDTH = len(_COLUMNS) + 1


_NOBODY = np.zeros(_WIDTH, np.int32)
"""The columns of a row of no sequence: they ask for no work."""
_NOBODY[_COLUMNS.index("repetition_penalty")] = _NOBODY[_COLUMNS.index("top_p")] = np.float32(1.0).view(np.int32)


class SlotRows:
    """What steps repeat of every running sequence, by slot: packing then costs a copy, not a pass over each field."""

    def __init__(self, num_slots: int, pages_per_seq: int, groups: int = 1):
        self.params = np.zeros((num_slots, _WIDTH), np.int32)
        self.stop_ids = np.zeros((num_slots, MAX_STOP_IDS), np.int32)
        self.pages = [np.zeros((num_slots, pages_per_seq), np.int32) for _ in range(groups)]
        """Of each group of layers; in the place of a page that was given up any one."""
        self._num_pages = [[0] * num_slots for _ in range(groups)]

    def update(self, plan: Plan) -> None:
        """Takes in who has got a slot with this plan, and whose pages have grown."""
        for sequence in plan.admitted:
            self.params[sequence.slot] = _columns(sequence)
            self.stop_ids[sequence.slot] = stop_ids(sequence)
            for known in self._num_pages:
                known[sequence.slot] = 0
        last = self._num_pages[-1]
        for row in plan.rows:
            slot, groups = row.slot, row.sequence.pages
            if len(groups[-1]) > last[slot]:  # the last group's grow whenever any other's do
                for table, known, pages in zip(self.pages, self._num_pages, groups, strict=True):
                    table[slot, known[slot] : len(pages)] = np.maximum(pages[known[slot] :], 0)
                    known[slot] = len(pages)


def stop_ids(sequence: Sequence) -> np.ndarray:
    """The ids that end a sequence, int32 [MAX_STOP_IDS], -1 in unused places."""
    params = sequence.request.params
    found = list({*params.stop_token_ids, *(() if params.ignore_eos else sequence.request.eos_token_ids)})
    ids = np.full(MAX_STOP_IDS, -1, np.int32)
    ids[: len(found)] = found
    return ids


def _columns(sequence: Sequence) -> np.ndarray:
    """A sequence's row of `SlotRows.params`, floats by their bits."""
    params = sequence.request.params
    assert params.seed is not None, "the engine gives every request a seed"
    seed = params.seed + sequence.index
    ints = (
        params.top_k,
        sequence.num_prompt,
        params.min_tokens,
        bool(params.logit_bias or params.banned_token_ids or params.allowed_token_ids),
        params.allowed_token_ids is not None,
        params.logprobs is not None,
    )
    floats = (
        params.temperature if params.temperature >= GREEDY_BELOW else 0.0,
        max(params.top_p, LEAST_TOP_P),
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
    words = ((seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF)
    return np.concatenate(
        [
            np.array(ints, np.int32),
            np.array(floats, np.float32).view(np.int32),
            np.array(words, np.uint32).view(np.int32),
        ]
    )


class _Table(NamedTuple):
    """A group's page table: `width` pages, from the last multiple of `step` positions that hides nothing; 0: from 0."""

    width: int
    window: int | None = None
    step: int = 0

    def begins(self, starts: Seq[int]) -> np.ndarray:
        """Where the tables of sequences begin whose first tokens of this launch are at `starts`."""
        assert self.window is not None
        return np.maximum(0, np.asarray(starts) - self.window + 1) // self.step * self.step


def _tables(most: int, pages_per_seq: int, windows: Seq[int | None], page_size: int) -> list[_Table]:
    """Of every group. Those with a window need only list what a launch of up to `most` tokens of a sequence sees,
    unless there is but one group."""
    tables, step = [], aligned(page_size)
    for window in windows:
        seen = 0 if window is None else window - 1 + most
        width = -(-(seen + step - 1) // page_size)
        narrow = len(windows) > 1 and window is not None and width < pages_per_seq
        tables.append(_Table(width, window, step) if narrow else _Table(pages_per_seq))
    return tables


class Layout:
    """Where each array of a shape lies in the step's one int32 buffer; one transfer a step is cheaper than twenty.

    `windows`: of each group of layers, as PageGroups has them. A shape of one token a sequence is for launches of up to
    `steps` steps.
    """

    def __init__(
        self,
        shape: Shape,
        pages_per_seq: int,
        num_slots: int,
        windows: Seq[int | None] = (None,),
        page_size: int = 1,
        steps: int = 1,
    ):
        self.shape, self.num_slots = shape, num_slots
        self.steps = steps if shape.single else 1
        self._tables = _tables(self.steps if shape.single else shape.tokens, pages_per_seq, windows, page_size)
        self._page_size = page_size
        t, s = shape.tokens, shape.seqs
        sizes = {
            "tokens": (t,),
            "targets": (t,),
            "kv_lens": (s,),
            "cu_q_lens": (s + 1,),
            "distribution": (3,),
            **{f"page_table{i}": (s, table.width) for i, table in enumerate(self._tables)},
            **{f"kv_begin{i}": (s,) for i, table in enumerate(self._tables) if table.step},
            "slots": (s,),
            "samples": (s,),
            "params": (s, _WIDTH),
        }
        if self.steps > 1:
            sizes |= {"steps": (s,), "stop_ids": (s, MAX_STOP_IDS)}
        self._fields: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        end = 0
        for name, size in sizes.items():
            start, end = end, end + int(np.prod(size))
            self._fields[name] = (start, end, size)
        self.size = end

    def pack(self, plan: Plan, slots: SlotRows) -> np.ndarray:
        """The plan's buffer, int32 [size]; `slots` must have been told of the plan."""
        buffer = np.zeros(self.size, np.int32)
        view = {name: buffer[a:b].reshape(size) for name, (a, b, size) in self._fields.items()}
        used, singles = len(plan.rows), plan.num_single
        which = [row.slot for row in plan.rows]
        starts = [row.start for row in plan.rows]
        counts = [row.count for row in plan.rows]
        view["targets"].fill(-1)
        view["slots"].fill(self.num_slots)
        view["cu_q_lens"].fill(plan.num_tokens)
        view["distribution"][:] = (singles, singles, used)
        view["slots"][:used] = which
        view["samples"][:used] = [row.last for row in plan.rows]
        view["kv_lens"][:used] = np.add(starts, counts)
        view["cu_q_lens"][:used] = np.cumsum([0, *counts[:-1]])
        for i, (table, pages) in enumerate(zip(self._tables, slots.pages, strict=True)):
            if table.step:
                begins = table.begins(starts)
                blocks = begins[:, None] // self._page_size + np.arange(table.width)
                view[f"kv_begin{i}"][:used] = begins
                view[f"page_table{i}"][:used] = pages[np.array(which)[:, None], np.minimum(blocks, pages.shape[1] - 1)]
            else:
                view[f"page_table{i}"][:used] = pages[which]
        view["params"][:used] = slots.params[which]
        view["params"][used:] = _NOBODY
        if self.steps > 1:
            view["steps"][:used] = [row.steps for row in plan.rows]
            view["stop_ids"][:used] = slots.stop_ids[which]
        tokens = [row.sequence.tokens for row in plan.rows[:singles]]
        known = zip(tokens, starts, strict=False)
        view["tokens"][:singles] = [t[start] if start < len(t) else -1 for t, start in known]
        at = 0
        for row in plan.rows:
            if row.count > 1:
                row_tokens = row.sequence.tokens[row.start : row.start + row.count]
                view["tokens"][at : at + row.count] = row_tokens if len(row_tokens) == row.count else [*row_tokens, -1]
            if scored := row.scored:
                first = at + scored.start - 1 - row.start  # the token before the first one
                view["targets"][first : first + len(scored)] = row.sequence.tokens[scored.start : scored.stop]
            at += row.count
        return buffer

    def unpack(self, buffer: Int[Array, " size"]) -> StepInput:
        """The same arrays, cut out of the buffer on the device."""
        view = {name: buffer[a:b].reshape(size) for name, (a, b, size) in self._fields.items()}
        params = view.pop("params")  # [S, columns]
        of: dict[str, jax.Array] = {name: params[:, i] for i, name in enumerate(_INTS + _FLOATS)}
        for name in _FLOATS:
            of[name] = jax.lax.bitcast_convert_type(of[name], jnp.float32)
        for name in _BOOLS:
            of[name] = of[name] != 0
        seed = jax.lax.bitcast_convert_type(params[:, -2:], jnp.uint32)
        min_tokens = of.pop("min_tokens")
        ban_stop = _ban_stop(view["kv_lens"], of["num_prompt"], min_tokens)
        rows = RowParams(seed=seed, position=view["kv_lens"], ban_stop=ban_stop, **of)
        page_tables = tuple(view.pop(f"page_table{i}") for i in range(len(self._tables)))
        kv_begins = tuple(view.pop(f"kv_begin{i}", None) for i in range(len(self._tables)))
        return StepInput(rows=rows, min_tokens=min_tokens, page_tables=page_tables, kv_begins=kv_begins, **view)


def _powers(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... and `last` itself."""
    out = []
    while first < last:
        out.append(first)
        first *= factor
    return [*out, last]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
