"""A device that only remembers, and the engine's loop around it: what each step reads must be what a sequence said."""

import zlib

from jaxserve.pages import PagePool
from jaxserve.plans import Sampled
from jaxserve.request import Logprobs, Request, SamplingParams
from jaxserve.scheduler import Scheduler


def next_token(request_id, index, position):
    """What the pretended model samples at a position: a sequence's tokens depend on itself alone."""
    return zlib.crc32(f"{request_id} {index} {position}".encode()) % 50


def logprob(tokens, position):
    """What the pretended model says of a prompt's token."""
    return Logprobs(-float(zlib.crc32(bytes(tokens[: position + 1])) % 1000), 1)


def scores(prompt, first):
    """What a request for prompt_logprobs_from=first is to hear."""
    first = max(1, first)
    return (*[None] * first, *(logprob(list(prompt), p) for p in range(first, len(prompt))))


def ends(sequence, token, position):
    """Whether a token, at its position, ends its sequence."""
    params = sequence.request.params
    return token in params.stop_token_ids and position + 1 - sequence.num_prompt >= max(1, params.min_tokens)


class Device:
    """Executes plans in launch order: pages of tokens, and what each slot has sampled, by position."""

    def __init__(self, num_pages, page_size, windows=(None,)):
        self.page_size, self.windows = page_size, windows
        self.kv = [[None] * page_size for _ in range(num_pages)]
        self.said = {}

    def launch(self, plan):
        tokens = [[] for _ in plan.rows]
        for step in range(plan.steps):
            live = []
            for i, row in enumerate(plan.rows):
                first, end = row.start + step, row.start + step + row.count
                over = ends(row.sequence, self.known(row, end - 1), end - 1) if len(tokens[i]) == step else True
                if step < row.steps and (step == 0 or not over):
                    live.append((row, tokens[i], end, over))
                    for position in range(first, end):  # all writes come before all reads, as attention has it
                        block, place = divmod(position, self.page_size)
                        for group, pages in enumerate(row.sequence.pages):
                            self.kv[pages[block]][place] = (group, position, self.known(row, position))
            for row, out, end, over in live:
                s = row.sequence
                if not over:  # else this was planned before the host knew
                    said = [next_token(s.request.id, s.index, p) for p in range(s.num_prompt, end)]
                    wanted = [*s.request.prompt_token_ids, *said][:end]
                    for group, (window, pages) in enumerate(zip(self.windows, s.pages, strict=True)):
                        first = 0 if window is None else max(0, row.start + step - window + 1)
                        assert -1 not in pages[first // self.page_size :], "gave up what it sees"
                        seen = [self.kv[pages[p // self.page_size]][p % self.page_size] for p in range(first, end)]
                        right = [(group, p, token) for p, token in enumerate(wanted)]
                        assert seen == right[first:], f"{s.request.id}[{s.index}] read another's pages"
                if not over or plan.steps == 1:
                    out.append(next_token(s.request.id, s.index, end))
                    self.said[row.slot, end] = out[-1]
        for row, out in zip(plan.rows, tokens, strict=True):  # where the next launch looks for its token
            end = row.start + row.count
            self.said[row.slot, end - 1 + row.steps] = out[-1] if out else self.known(row, end - 1)
        scored = {i: [logprob(row.sequence.tokens, p) for p in row.scored] for i, row in enumerate(plan.rows)}
        return Sampled(tokens, prompt_logprobs={i: found for i, found in scored.items() if found})

    def known(self, row, position):
        tokens = row.sequence.tokens
        return tokens[position] if position < len(tokens) else self.said[row.slot, position]


def scheduler(pages=16, size=4, seqs=4, budget=16, length=40, **options):
    """`windows` as PageTables has them."""
    return Scheduler(
        PagePool(pages, size), max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=length, **options
    )


def request(name, prompt, **params):
    extra = {k: params.pop(k) for k in ("priority", "timeout_s", "cache_salt", "eos_token_ids") if k in params}
    return Request(id=name, prompt_token_ids=tuple(prompt), params=SamplingParams(**params), **extra)


def run(s, device, steps=10_000):
    """The engine's loop: launch the next step, then commit the one before. Returns every delta."""
    pending, deltas = None, []
    for _ in range(steps):
        plan = s.plan(0.0)
        launched = (plan, device.launch(plan)) if plan else None
        if pending:
            deltas += s.commit(*pending, 0.0)
        pending = launched
        s.check_integrity()
        if pending is None and s.idle:
            return deltas
    raise AssertionError("not finished")


def output(deltas, name, index=0):
    return [t for d in deltas if d.request_id == name and d.index == index for t in d.token_ids]


def expected(name, prompt_len, count, index=0):
    return [next_token(name, index, prompt_len + i) for i in range(count)]
