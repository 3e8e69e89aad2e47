"""What the scheduler and the runner hand to each other: sequences, the rows of a plan, and what came back. No jax."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from jaxserve.pages import Tables
from jaxserve.request import Logprobs, Request


@dataclass(eq=False, slots=True)
class Sequence:
    """One continuation of one request.

    tokens [0, num_prompt) is the prompt, the rest what was sampled and has reached the host.
    KV:  [0, num_computed) written by launched steps   [num_computed, num_wanted) still to compute
    """

    request: Request
    index: int
    order: int
    arrival: float
    tokens: list[int]
    num_prompt: int
    limit: int
    """Tokens, prompt included, at which the sequence ends."""
    deadline: float | None = None
    pages: Tables = field(default_factory=list)
    """Empty while it waits."""
    hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    num_computed: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    in_flight: int = 0
    slot: int = -1
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    num_captured: int | None = None
    """Positions whose captured values have been delivered; None where none are wanted."""
    finished: bool = False

    @property
    def length(self) -> int:
        """Tokens, those included that only the device knows."""
        return len(self.tokens) + self.in_flight

    @property
    def scoring(self) -> bool:
        """max_tokens is 0: nothing is sampled."""
        return self.request.params.max_tokens == 0

    @property
    def num_wanted(self) -> int:
        """Tokens to compute: all, but for the last one of a prompt that is only scored, which predicts nothing."""
        if self.scoring and not self.request.embed and self.num_captured is None:
            return max(1, self.num_prompt - 1)
        return self.length

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt


@dataclass(slots=True)
class Row:
    """One sequence's part of a step: `count` tokens from position `start`; `last` if they reach its end.

    A decode may go on for several steps in one launch, each with the token that the one before has sampled.
    """

    sequence: Sequence
    slot: int
    start: int
    count: int
    last: bool
    steps: int = 1

    @property
    def scored(self) -> range:
        """Positions of the prompt's tokens, each after one of this row, whose log-probabilities are wanted."""
        sequence = self.sequence
        if sequence.prompt_logprobs is None:
            return range(0)
        first = max(self.start + 1, sequence.request.params.prompt_logprobs_from)
        return range(first, max(first, min(self.start + self.count + 1, sequence.num_prompt)))

    @property
    def captured(self) -> range:
        """Positions of this row whose captured values are still wanted: a preempted sequence computes some twice."""
        end, known = self.start + self.count, self.sequence.num_captured
        return range(end, end) if known is None else range(min(max(self.start, known), end), end)


@dataclass(slots=True)
class Plan:
    """A step: rows of one token first. `admitted` are sequences that have just got their slot."""

    rows: list[Row]
    num_single: int
    num_tokens: int
    """Of the first step, where there are several."""
    admitted: list[Sequence]

    @property
    def steps(self) -> int:
        return max(row.steps for row in self.rows)

    @property
    def num_computed(self) -> int:
        """Tokens of all steps, if no sequence ends before."""
        return sum(row.count * row.steps for row in self.rows)


@dataclass(slots=True)
class Sampled:
    """What a launch brought back, by row: token ids, one a step until it ended, and log-probabilities if asked for."""

    tokens: Seq[Seq[int]]
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    """By row: the log-probabilities of the tokens at its `scored` positions."""
    embeddings: dict[int, bytes] = field(default_factory=dict)
    """By row that ends a prompt, of a model that gives embeddings: see Delta."""
    captured: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    """By row: the values at its `captured` positions, as in Delta."""
