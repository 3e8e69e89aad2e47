"""Plans the next step. Knows pages, slots and requests; never sees an array.

    waiting --admit--> running --finish--> gone
       ^------preempt-----'

`plan` and `commit` alternate, and the plan of step n+1 is made before step n is committed, so a running sequence
may have sampled tokens that only the device knows (`in_flight`): one, or those of a launch of several steps. Everything
that a plan hands out is written and read in launch order on the device; that is why pages and slots can be reused as
soon as they are released.
"""

import heapq
from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from jaxserve import lookahead
from jaxserve.errors import DeadlineExceeded, JaxserveError, Overloaded
from jaxserve.page_groups import pages_held
from jaxserve.pages import PagePool, PageTables, Tables, extend_hashes
from jaxserve.plans import Plan, Row, Sampled, Sequence
from jaxserve.request import Delta, ErrorInfo, FinishReason, Logprobs, Request

REST_FROM, REST_STEPS = 4, 2
"""See Scheduler._rest."""


@dataclass(slots=True)
class Stats:
    """Counts since the start."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were not computed."""
    looked_up_tokens: int = 0
    hit_tokens: int = 0
    """Tokens looked up in the prefix cache, and found; preempted sequences come again."""
    generated_tokens: int = 0
    discarded_tokens: int = 0


class Scheduler:
    """Fills each step's token budget: running sequences of one token first, then prompts in chunks, then new ones.

    Where the running ones would take much of a budget that prompts could fill by themselves, they sit steps out; see
    `_rest`.

    `windows`: of each group of layers, as PageTables has them.
    """

    def __init__(
        self,
        pages: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_queued_requests: int = 1024,
        priorities: bool = False,
        prefix_caching: bool = True,
        windows: Seq[int | None] = (None,),
        most_steps: Callable[[int], int] = lambda seqs: 1,
        whole_prompts: bool = False,
        capturing: bool = False,
    ):
        """`most_steps` says how many decode steps a launch of so many sequences may take. `whole_prompts`: a prompt is
        computed in one step, as encoders need it, and not in pieces. `capturing`: every position of every sequence is
        computed, and its values delivered once."""
        assert max_num_batched_tokens >= max_num_seqs, "every running sequence must get its token"
        assert max_num_batched_tokens >= max_model_len or not whole_prompts, "the longest prompt must fit a step"
        alone = pages_held(windows, max_model_len, pages.page_size)
        assert pages.num_pages >= alone, "the longest sequence must fit the pool alone"
        self.pages = pages
        self.tables = PageTables(pages, windows)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_queued_requests = max_queued_requests
        self.priorities = priorities
        self.prefix_caching = prefix_caching
        self._most_steps = most_steps
        self.whole_prompts = whole_prompts
        self.capturing = capturing
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_deferred = 0
        """Sequences that the last plan had room for, but left waiting for pages that it computes for another one."""
        self.weights_version = 0
        """Of the weights that compute the next step; the first delta of a sequence says it."""
        self.holding = False
        """Requests that have not begun wait for `renew`, those that have go on."""
        self.stats = Stats()
        self.ended: list[Sequence] = []
        """Sequences that finished by themselves, for whoever measures them to take."""
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._requests: dict[str, list[Sequence]] = {}
        self._queued: set[str] = set()
        """Requests none of whose sequences has ever run."""
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._order = 0
        self._rested = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def begun(self) -> bool:
        """Whether there is a request one of whose sequences has run."""
        return len(self._requests) > len(self._queued)

    def renew(self) -> None:
        """From now on everything is computed by other weights. Nothing may have begun."""
        assert not self.begun, "a request would go on with the keys and values of other weights"
        self.pages.forget()
        self.weights_version += 1
        self.holding = False

    def add(self, request: Request, now: float) -> None:
        """Queues a checked request. Raises Overloaded when the queue is full."""
        if len(self._queued) >= self.max_queued_requests:
            raise Overloaded(
                f"{self.max_queued_requests} requests are waiting already; try again later, or raise "
                "--max-queued-requests"
            )
        prompt, params = list(request.prompt_token_ids), request.params
        limit = self.max_model_len if params.max_tokens is None else len(prompt) + params.max_tokens
        deadline = None if request.timeout_s is None else now + request.timeout_s
        for index in range(params.n):
            sequence = Sequence(
                request,
                index,
                self._order,
                now,
                list(prompt),
                len(prompt),
                max(len(prompt), min(limit, self.max_model_len)),
                deadline,
                num_captured=0 if self.capturing else None,
            )
            self._order += 1
            if index == 0 and params.prompt_logprobs is not None:
                sequence.prompt_logprobs = [None] * max(1, params.prompt_logprobs_from)
            if deadline is not None:
                heapq.heappush(self._deadlines, (deadline, sequence.order, sequence))
            insort(self.waiting, sequence, key=self._rank)
            self._requests.setdefault(request.id, []).append(sequence)
        self._queued.add(request.id)

    def abort(self, request_id: str) -> bool:
        """Ends all sequences of a request at once; their pages are free for the next plan. False if it is unknown."""
        sequences = list(self._requests.get(request_id, ()))
        for sequence in sequences:
            self._end(sequence)
        return bool(sequences)

    def expire(self, now: float) -> list[Delta]:
        """Ends every request whose deadline has passed, and says so to its reader."""
        deltas = []
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].finished):
            sequence = heapq.heappop(self._deadlines)[2]
            if not sequence.finished:
                self._end(sequence)
                message = f"the request's timeout of {sequence.request.timeout_s:g} s passed before it finished"
                deltas.append(_failure(sequence, DeadlineExceeded(message, param="timeout")))
        return deltas

    def fail_all(self, error: JaxserveError, *, begun_only: bool = False) -> list[Delta]:
        """Ends everything with an error, or every request that has begun."""
        deltas = []
        spared = set(self._queued) if begun_only else set()
        for sequence in [s for name, group in self._requests.items() if name not in spared for s in group]:
            self._end(sequence)
            deltas.append(_failure(sequence, error))
        return deltas

    def plan(self, now: float) -> Plan | None:
        """The next step, or None when there is nothing to compute now."""
        singles: list[Row] = []
        chunks: list[Row] = []
        placed: list[Sequence] = []
        admitted: list[Sequence] = []
        computing: set[bytes] = set()  # the blocks of prompts that this step fills
        budget, size = self.max_num_batched_tokens, self.pages.page_size

        def place(sequence: Sequence, count: int) -> None:
            nonlocal budget
            start, end = sequence.num_computed, sequence.num_wanted
            last = start + count == end
            (singles if count == 1 else chunks).append(Row(sequence, sequence.slot, start, count, last))
            placed.append(sequence)
            sequence.num_computed += count
            computing.update(sequence.hashes[sequence.num_registered : sequence.num_computed // size])
            budget -= count
            if last and sequence.length < sequence.limit:
                sequence.in_flight += 1

        # Decodes before prompts, each in rank order: what is preempted for pages is always of lower rank.
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        ending = False
        for sequence in self.running:
            length = len(sequence.tokens) + sequence.in_flight
            if length < sequence.limit:
                (decodes if length - sequence.num_computed == 1 else prompts).append(sequence)
            elif sequence.scoring and sequence.num_computed < sequence.num_wanted:
                prompts.append(sequence)
            else:
                ending = True  # with this commit
        if resting := self._rest(len(decodes), prompts):
            decodes = []
        for sequence in decodes:  # nearly all of a busy step: no more than it takes
            start = sequence.num_computed
            room = sequence.slot >= 0 and (start < len(sequence.pages[-1]) * size or self._grow(sequence, singles))
            if room:
                singles.append(Row(sequence, sequence.slot, start, 1, True))
                sequence.num_computed = start + 1
                sequence.in_flight += start + 1 < sequence.limit
        budget -= len(singles)
        for sequence in prompts:
            if budget and sequence.slot >= 0 and (count := self._room(sequence, budget, singles + chunks)):
                place(sequence, count)
        deferred, short = 0, False
        for sequence in list(self.waiting):
            if not budget or not self._free_slots:
                break
            if not self._may_begin(sequence):
                continue
            if sequence.in_flight:
                break  # just preempted; nobody of lower rank may take its pages before its token has come back
            if self.whole_prompts and sequence.num_wanted > budget:
                break
            blocks = self._sharable(sequence)
            found = self.tables.match(blocks)
            if len(found[0]) < len(blocks) and blocks[len(found[0])] in computing:
                deferred += 1  # one step later it shares them
                continue
            count = self._admit(sequence, found, budget, now)
            if not count:
                short = True
                break
            admitted.append(sequence)
            place(sequence, count)

        self.num_deferred = deferred
        for sequence in placed:  # only now: a step never reads blocks that it computes itself
            self._register(sequence)
        rows = singles + chunks
        if not rows:
            if not resting:
                return None
            self._rested = REST_STEPS  # nobody else can go on after all
            return self.plan(now)
        full = (short or not self._free_slots) and not ending  # nobody who waits could come in with the next plan
        if not prompts and not admitted and (full or not self.waiting):
            self._look_ahead(rows)
        return Plan(rows, len(singles), self.max_num_batched_tokens - budget, admitted)

    def commit(self, plan: Plan, sampled: Sampled, now: float) -> list[Delta]:
        """Applies what a step sampled; returns what its sequences' readers are to hear.

        A sequence that ended after the plan was made has run one token too far; that token is discarded. One that
        was preempted meanwhile keeps its token: the step that sampled it was right.
        """
        deltas, size = [], self.pages.page_size
        for i, row in enumerate(plan.rows):
            sequence = row.sequence
            produced = row.last and not sequence.scoring and row.start + row.count < sequence.limit
            if sequence.finished:
                self.stats.discarded_tokens += len(sampled.tokens[i]) if produced else 0
                continue
            if i in sampled.prompt_logprobs and sequence.prompt_logprobs is not None:
                known = len(sequence.prompt_logprobs)  # a preempted prompt comes twice
                sequence.prompt_logprobs += sampled.prompt_logprobs[i][known - row.scored.start :]
            captured = sampled.captured.get(i)
            if captured is not None:
                sequence.num_captured = row.captured.stop
            if not row.last:
                if captured is not None:
                    deltas.append(Delta(sequence.request.id, sequence.index, captured=captured))
                continue
            if not produced:  # max_tokens 0: the prompt was all there was to compute
                ending = FinishReason.STOP if sequence.request.embed else FinishReason.LENGTH
                embedding = sampled.embeddings.get(i)
                deltas.append(self._deliver(sequence, (), None, ending, None, now, embedding, captured))
                continue
            sequence.in_flight -= row.steps
            tokens, finish, stop_token = sampled.tokens[i], None, None
            for token in tokens:
                sequence.tokens.append(token)
                finish, stop_token = self._finish(sequence, token)
            assert tokens and (finish or len(tokens) == row.steps), "the device ended a sequence that goes on"
            self.stats.generated_tokens += len(tokens)
            if sequence.first_token is None:
                sequence.first_token = now
            if len(tokens) < row.steps:  # the steps after its end computed nothing
                sequence.num_computed = min(sequence.num_computed, len(sequence.tokens) - 1)
            if sequence.slot >= 0 and len(sequence.tokens) >= (sequence.num_registered + 1) * size:
                self._register(sequence)
            logprobs = tuple(sampled.logprobs[i]) if i in sampled.logprobs else None
            deltas.append(self._deliver(sequence, tuple(tokens), logprobs, finish, stop_token, now, captured=captured))
        return deltas

    def check_integrity(self) -> None:
        """Asserts that every page, slot and request is where it should be, exactly once."""
        self.tables.check_integrity([s.pages for s in self.running], [s.num_computed for s in self.running])
        slots = sorted([s.slot for s in self.running] + self._free_slots)
        assert slots == list(range(len(slots))), "a slot is lost or held twice"
        live = [s for group in self._requests.values() for s in group]
        assert {id(s) for s in live} == {id(s) for s in self.waiting + self.running}, "a sequence is lost"
        assert not any(s.finished for s in live), "a finished sequence is still queued"
        assert self._queued <= {s.request.id for s in self.waiting}, "a request that runs counts as queued"
        assert all(not s.pages and s.slot < 0 and not s.num_computed for s in self.waiting), "a waiting one holds pages"
        assert [self._rank(s) for s in self.waiting] == sorted(self._rank(s) for s in self.waiting), (
            "queue out of order"
        )
        for s in self.running:
            assert s.num_computed <= s.length <= s.limit, "longer than it may become"

    def _rank(self, sequence: Sequence) -> tuple[int, int]:
        """Lower goes first and is preempted last."""
        return (sequence.request.priority if self.priorities else 0, sequence.order)

    def _sharable(self, sequence: Sequence) -> list[bytes]:
        """The hashes of the blocks that may come from elsewhere: those before the first token whose output counts."""
        if self.capturing:  # all of them count
            return []
        self._extend_hashes(sequence)
        first = sequence.num_wanted  # the last token is computed always: its logits are wanted
        known = sequence.prompt_logprobs
        if known is not None and len(known) < sequence.num_prompt:
            first = min(first, len(known))
        return sequence.hashes[: (first - 1) // self.pages.page_size]

    def _extend_hashes(self, sequence: Sequence) -> None:
        # Without a cache across requests, the continuations of one request still share their prompt.
        salt = sequence.request.cache_salt if self.prefix_caching else f"request {sequence.request.id}"
        extend_hashes(sequence.hashes, sequence.tokens, self.pages.page_size, salt)

    def _admit(self, sequence: Sequence, found: Tables, budget: int, now: float) -> int:
        """Gives a waiting sequence a slot, and pages, `found` first.

        Returns how many tokens, up to the budget, it can compute now; 0 if there are too few pages.
        """
        start = len(found[0]) * self.pages.page_size
        self.tables.share(found)
        wanted = sequence.num_wanted
        count = self.tables.extend(found, start, min(wanted - start, budget), whole=wanted)
        if not count:
            self.tables.release(found)
            return 0
        sequence.pages = found
        sequence.num_registered = start // self.pages.page_size
        sequence.num_computed = start
        sequence.slot = self._free_slots.pop()
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=self._rank)
        self.stats.looked_up_tokens += len(sequence.tokens)
        self.stats.hit_tokens += start
        self._queued.discard(sequence.request.id)
        if sequence.started is None:
            sequence.started = now
            sequence.num_cached = start
            self.stats.cached_tokens += start
            self.stats.prompt_tokens += sequence.num_prompt
        return count

    def _may_begin(self, sequence: Sequence) -> bool:
        """Whether one that waits need not wait for `renew`."""
        return not (self.holding and sequence.request.id in self._queued)

    def _rest(self, decodes: int, prompts: list[Sequence]) -> bool:
        """Whether so many decodes sit this step out, for prompts that wait.

        The last of many prompts that came together waits for all that is computed before it, and a step of prompts
        alone has few rows to sample. So decodes that would take 1/REST_FROM of a step or more, which prompts can fill
        without them, come along in one step of REST_STEPS + 1. With priorities a decode may outrank who waits, and
        with few pages there is no knowing that prompts fill a step: they come along always.
        """
        budget, size = self.max_num_batched_tokens, self.pages.page_size
        free = self.pages.available // len(self.tables.windows) * size
        if decodes * REST_FROM >= budget and self._rested < REST_STEPS and free >= 2 * budget and not self.priorities:
            left = budget - sum(s.num_wanted - s.num_computed for s in prompts)
            for s in self.waiting[: len(self._free_slots)]:
                if left <= 0:
                    break
                if self._may_begin(s):
                    left -= s.num_wanted - self.tables.known(self._sharable(s)) * size
            if left <= 0:
                self._rested += 1
                return True
        self._rested = 0
        return False

    def _grow(self, sequence: Sequence, planned: list[Row]) -> bool:
        """Takes the pages of one more token, preempting from the lowest rank up; False if this one had to go itself."""
        holders = {id(row.sequence) for row in planned}
        while not self.tables.extend(sequence.pages, sequence.num_computed, 1):
            victim = next((s for s in reversed(self.running) if id(s) not in holders), sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _room(self, sequence: Sequence, budget: int, planned: list[Row]) -> int:
        """For how many of a prompt's tokens there is room in this step, and takes their pages.

        For one token others of lower rank are preempted. Where that does not help, it waits with what it has: whoever
        is in the step already will end.
        """
        start = sequence.num_computed
        count = min(sequence.num_wanted - start, budget)
        while not (room := self.tables.extend(sequence.pages, start, count)):
            holders = {id(row.sequence) for row in planned}
            lower = (s for s in reversed(self.running) if id(s) not in holders and self._rank(s) > self._rank(sequence))
            victim = next(lower, None)
            if victim is None:
                return 0
            self._preempt(victim)
        return room

    def _look_ahead(self, rows: list[Row]) -> None:
        """Has decodes go on in the same launch, as far as there are pages."""
        if (most := self._most_steps(len(rows))) == 1:
            return
        size, left = self.pages.page_size, [row.sequence.limit - row.start - 1 for row in rows]
        starts, held = [row.start for row in rows], [len(row.sequence.pages[-1]) for row in rows]
        free = self.pages.available // len(self.tables.windows)  # of every group a sequence takes as many
        steps = lookahead.num_steps(starts, left, held, most, free, size)
        for row, tokens in zip(rows, left, strict=True):
            sequence, row.steps = row.sequence, min(steps, tokens)
            taken = self.tables.extend(sequence.pages, row.start, row.steps)
            assert taken == row.steps, "fewer pages than were free"
            sequence.num_computed += row.steps - 1
            sequence.in_flight += row.steps - 1

    def _preempt(self, sequence: Sequence) -> None:
        """Takes pages and slot away; the sequence waits at its old rank and is computed anew from its tokens."""
        self.stats.preemptions += 1
        sequence.num_preemptions += 1
        self._release(sequence)
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=self._rank)

    def _release(self, sequence: Sequence) -> None:
        self.tables.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], -1
        sequence.num_computed = sequence.num_registered = 0

    def _end(self, sequence: Sequence) -> None:
        sequence.finished = True
        if sequence.slot >= 0:
            self._release(sequence)
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        group = self._requests[sequence.request.id]
        group.remove(sequence)
        if not group:
            del self._requests[sequence.request.id]
            self._queued.discard(sequence.request.id)
        if not self.prefix_caching:
            self._discard(sequence, siblings=bool(group))

    def _discard(self, sequence: Sequence, siblings: bool) -> None:
        """Takes an ended sequence's blocks their names, which its siblings' share of alone is of use to anybody.

        Kept, they would have every page of the pool used in turn: memory that was touched stays this process's.
        """
        if not siblings and sequence.request.params.n > 1:
            self._extend_hashes(sequence)  # it may have ended before it was to begin
        shared = sequence.num_prompt // self.pages.page_size if siblings else 0
        self.tables.discard(sequence.hashes[shared:])

    def _register(self, sequence: Sequence) -> None:
        """Names the blocks that are full and whose tokens the host knows, so that others can share them."""
        size = self.pages.page_size
        full = min(sequence.num_computed, len(sequence.tokens)) // size
        if full <= sequence.num_registered:
            return
        if full > len(sequence.hashes):
            self._extend_hashes(sequence)
        for block in range(sequence.num_registered, full):
            self.tables.register(sequence.pages, block, sequence.hashes[block])
        sequence.num_registered = full

    def _finish(self, sequence: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        params = sequence.request.params
        if sequence.num_output >= params.min_tokens:
            eos = not params.ignore_eos and token in sequence.request.eos_token_ids
            if eos or token in params.stop_token_ids:
                return FinishReason.STOP, token
        if len(sequence.tokens) >= sequence.limit:
            return FinishReason.LENGTH, None
        return None, None

    def _deliver(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...],
        logprobs: tuple[Logprobs, ...] | None,
        finish: FinishReason | None,
        stop_token: int | None,
        now: float,
        embedding: bytes | None = None,
        captured: tuple[bytes, ...] | None = None,
    ) -> Delta:
        first = sequence.num_output == len(tokens)
        prompt_logprobs = sequence.prompt_logprobs if first else None
        if finish is not None:
            sequence.ended = now
            self.ended.append(sequence)
            self._end(sequence)
        return Delta(
            sequence.request.id,
            sequence.index,
            tokens,
            logprobs,
            None if prompt_logprobs is None else tuple(prompt_logprobs),
            sequence.num_cached if first else None,
            finish,
            stop_token,
            weights_version=self.weights_version if first else None,
            embedding=embedding,
            captured=captured,
        )


def _failure(sequence: Sequence, error: JaxserveError) -> Delta:
    return Delta(sequence.request.id, sequence.index, finish=FinishReason.ERROR, error=ErrorInfo.of(error))
