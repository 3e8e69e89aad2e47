"""The scheduler against a device that only remembers: what each step reads must be what the sequence said."""

import random
from contextlib import suppress

import pytest
from remembering_device import Device, expected, next_token, output, request, run, scheduler, scores

from jaxserve.errors import Overloaded
from jaxserve.page_groups import longest
from jaxserve.pages import block_hashes
from jaxserve.request import FinishReason


def test_one_request():
    s = scheduler()
    s.add(request("a", range(10), max_tokens=5), 0.0)
    deltas = run(s, Device(16, 4))
    assert output(deltas, "a") == expected("a", 10, 5)
    assert [d.finish for d in deltas] == [None] * 4 + [FinishReason.LENGTH]
    assert s.pages.usage == 0


def test_long_prompts_come_in_chunks_and_do_not_stall_decodes():
    s, device = scheduler(pages=40, budget=8, length=100), Device(40, 4)
    s.add(request("short", [1, 2], max_tokens=30), 0.0)
    s.add(request("long", range(50), max_tokens=3), 0.0)
    plan = s.plan(0.0)
    assert [(r.sequence.request.id, r.count, r.last) for r in plan.rows] == [("short", 2, True), ("long", 6, False)]
    s.commit(plan, device.launch(plan), 0.0)
    plan = s.plan(0.0)
    assert [(r.sequence.request.id, r.count) for r in plan.rows] == [("short", 1), ("long", 7)]
    assert plan.num_single == 1 and plan.num_tokens == 8
    s.commit(plan, device.launch(plan), 0.0)
    deltas = run(s, device)
    assert output(deltas, "long") == expected("long", 50, 3)


def test_stop_tokens_discard_what_ran_too_far():
    s = scheduler()
    stop = next_token("a", 0, 6)
    s.add(request("a", range(4), max_tokens=20, stop_token_ids=(stop,)), 0.0)
    deltas = run(s, Device(16, 4))
    want = expected("a", 4, 20)
    want = want[: want.index(stop) + 1]
    assert output(deltas, "a") == want
    assert deltas[-1].finish is FinishReason.STOP and deltas[-1].stop_token_id == stop
    assert s.stats.discarded_tokens == 1


def test_prefix_hits_and_salt():
    s, device = scheduler(pages=64), Device(64, 4)
    prompt = list(range(13))
    for name, salt in (("a", ""), ("b", ""), ("c", "tenant")):
        s.add(request(name, prompt, max_tokens=2, cache_salt=salt), 0.0)
        deltas = run(s, device)
        assert deltas[0].num_cached_tokens == {"a": 0, "b": 12, "c": 0}[name]
    s.add(request("d", [*prompt, *expected("b", 13, 2), 5], max_tokens=1), 0.0)
    assert run(s, device)[0].num_cached_tokens == 12
    s.add(request("e", prompt[:12], max_tokens=1), 0.0)
    assert run(s, device)[0].num_cached_tokens == 8, "the last token is always computed: its logits are wanted"
    s.add(request("f", prompt, max_tokens=1, prompt_logprobs=0), 0.0)
    assert run(s, device)[0].num_cached_tokens == 0, "prompt logprobs need every position"


def test_n_shares_also_when_there_is_room_not_to():
    s, device = scheduler(pages=400, size=4, seqs=8, budget=400, length=100), Device(400, 4)
    s.add(request("a", range(29), max_tokens=3, n=8), 0.0)
    plan = s.plan(0.0)
    assert len(plan.rows) == 1, "the others wait one step for the pages of the first"
    s.commit(plan, device.launch(plan), 0.0)
    plan = s.plan(0.0)
    assert [r.start for r in plan.rows] == [29] + [28] * 7
    s.commit(plan, device.launch(plan), 0.0)
    run(s, device)


def test_what_was_preempted_is_not_overtaken():
    s, device = scheduler(pages=8, size=2, seqs=3, budget=16, length=16), Device(8, 2)
    for name, first in (("a", 0), ("b", 10)):
        s.add(request(name, range(first, first + 7), max_tokens=9), 0.0)
    pending = None
    while not s.stats.preemptions:  # both have 4 pages; a needs a fifth
        if pending is None:
            s.add(request("c", [1, 2], max_tokens=2), 0.0)
        plan = s.plan(0.0)
        launched = (plan, device.launch(plan))
        if pending:
            s.commit(*pending, 0.0)
        pending = launched
    assert [q.request.id for q in s.waiting] == ["b", "c"], "c may not take what b gave up"
    s.commit(*pending, 0.0)
    run(s, device)


@pytest.mark.parametrize("caching", [True, False])
def test_n_shares_the_prompts_pages(caching):
    s, device = scheduler(pages=12, size=4, seqs=8, budget=32, length=40, prefix_caching=caching), Device(12, 4)
    s.add(request("a", range(29), max_tokens=3, n=4), 0.0)
    plan = s.plan(0.0)
    assert len(plan.rows) == 1 and s.num_deferred == 3, "all but the first wait for its pages"
    deltas = s.commit(plan, device.launch(plan), 0.0)
    deltas += run(s, device)  # 8 pages a sequence: four would need 32 if they did not share
    for index in range(4):
        assert output(deltas, "a", index) == expected("a", 29, 3, index)
    assert [d.num_cached_tokens for d in deltas if d.num_cached_tokens is not None] == [0, 28, 28, 28]
    assert s.stats.preemptions == 0
    s.add(request("b", range(29), max_tokens=1), 0.0)
    assert run(s, device)[0].num_cached_tokens == (28 if caching else 0)


@pytest.mark.parametrize("windows", [(None,), (None, 6)], ids=str)
def test_without_a_cache_the_same_pages_are_used_again(windows):
    s = scheduler(pages=40, seqs=2, prefix_caching=False, windows=windows)
    device, touched = Device(40, 4, windows), []
    for name in "abcdef":
        s.add(request(name, [*range(10), ord(name)], max_tokens=5), 0.0)
        run(s, device)
        touched.append(sum(page != [None] * 4 for page in device.kv))
    assert touched == touched[:1] * 6, "what a request leaves is of no use to any other"


def test_without_a_cache_siblings_that_come_one_by_one_still_share_their_prompt():
    s, device = scheduler(pages=16, size=4, seqs=1, prefix_caching=False), Device(16, 4)
    prompt = list(range(10))
    s.add(request("a", prompt, max_tokens=9, n=3), 0.0)
    deltas = run(s, device)
    assert [d.num_cached_tokens for d in deltas if d.num_cached_tokens is not None] == [0, 8, 8]
    assert sum(page != [None] * 4 for page in device.kv) == 5, "two of the prompt, three of each answer"
    assert s.tables.known(block_hashes(prompt, 4, "request a")) == 0, "and then it has gone"


def test_preemption_recomputes_and_nobody_notices():
    s, device = scheduler(pages=8, size=2, seqs=4, budget=8, length=16), Device(8, 2)
    for name in "abcd":
        s.add(request(name, range(3), max_tokens=9), 0.0)
    deltas = run(s, device)
    assert s.stats.preemptions > 0
    for name in "abcd":
        assert output(deltas, name) == expected(name, 3, 9)


def test_priority_goes_first_and_is_preempted_last():
    s, device = scheduler(seqs=1, priorities=True), Device(16, 4)
    for name, priority in (("low", 5), ("high", -1), ("middle", 0)):
        s.add(request(name, [1], max_tokens=1, priority=priority), 0.0)
    assert [d.request_id for d in run(s, device)] == ["high", "middle", "low"]


def test_queue_limit_and_deadlines():
    s, device = scheduler(seqs=1, max_queued_requests=2), Device(16, 4)
    s.add(request("a", [1], max_tokens=30, timeout_s=5.0), 0.0)
    s.add(request("b", [1], max_tokens=1, n=3, timeout_s=1.0), 0.0)
    with pytest.raises(Overloaded):
        s.add(request("c", [1]), 0.0)
    plan = s.plan(0.0)
    sampled = device.launch(plan)
    assert s.expire(0.5) == []
    expired = s.expire(1.5)
    assert [(d.request_id, d.index, d.error.kind) for d in expired] == [("b", i, "DeadlineExceeded") for i in range(3)]
    assert [d.request_id for d in s.expire(6.0)] == ["a"]
    assert s.commit(plan, sampled, 6.0) == [] and s.idle
    s.check_integrity()
    assert s.pages.usage == 0


def test_scoring_only_generates_nothing():
    s = scheduler()
    s.add(request("a", range(9), max_tokens=0), 0.0)
    assert s.plan(0.0).num_tokens == 8, "the last token predicts nothing that is wanted"
    s, device = scheduler(), Device(16, 4)
    for name, prompt in (("a", range(9)), ("b", [5]), ("c", range(9))):
        s.add(request(name, prompt, max_tokens=0), 0.0)
    deltas = run(s, device)
    assert sorted((d.request_id, d.token_ids, d.finish) for d in deltas) == [
        (name, (), FinishReason.LENGTH) for name in "abc"
    ]
    assert s.plan(0.0) is None


@pytest.mark.parametrize("size", [1, 4])
def test_what_begins_alike_is_computed_once(size):
    """Three endings of one context, and another context that begins like it, all at once."""
    s, device = scheduler(pages=128 // size, size=size, seqs=8, budget=64, length=40), Device(128 // size, size)
    context = list(range(13))
    prompts = {"a": [*context, 20, 21, 22], "b": [*context, 30, 31], "c": [*context, 40], "d": [*context[:5], 9, 9]}
    for name, prompt in prompts.items():
        first = 5 if name == "d" else 13
        s.add(request(name, prompt, max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=first), 0.0)
    plan = s.plan(0.0)
    assert [(r.sequence.request.id, r.count) for r in plan.rows] == [("a", 15)] and s.num_deferred == 3
    sampled = device.launch(plan)
    follow = s.plan(0.0)
    # Each computes anew what is in no full page, and the last token of the context: it says how the ending begins.
    starts = {"b": 12, "c": 12, "d": 4}
    assert {r.sequence.request.id: r.start for r in follow.rows} == starts, "12 and 4 are multiples of 4, too"
    deltas = s.commit(plan, sampled, 0.0) + s.commit(follow, device.launch(follow), 0.0)
    assert {d.request_id: d.prompt_logprobs for d in deltas} == {
        name: scores(prompt, 5 if name == "d" else 13) for name, prompt in prompts.items()
    }
    assert s.idle and not s.plan(0.0)
    s.check_integrity()


def test_who_waits_for_the_pages_of_another_goes_on_when_that_one_goes():
    s, device = scheduler(pages=20, size=2, seqs=3, budget=20, length=20), Device(20, 2)
    for name in "ab":
        s.add(request(name, range(11), max_tokens=2), 0.0)
    device.launch(s.plan(0.0))
    assert s.num_deferred == 1
    s.abort("a")
    plan = s.plan(0.0)
    assert [(r.sequence.request.id, r.start) for r in plan.rows] == [("b", 10)], "its step is under way"
    deltas = s.commit(plan, device.launch(plan), 0.0) + run(s, device)
    assert output(deltas, "b") == expected("b", 11, 2) and s.num_deferred == 0


def counts(plan):
    return [(row.sequence.request.id, row.count, row.steps) for row in plan.rows]


def test_decodes_go_several_steps_when_nobody_can_come_in():
    s, device = scheduler(pages=40, seqs=2, length=60, most_steps=lambda seqs: 8), Device(40, 4)
    s.add(request("a", range(5), max_tokens=30), 0.0)
    first = s.plan(0.0)
    assert counts(first) == [("a", 5, 1)], "a prompt"
    second = s.plan(0.0)
    assert counts(second) == [("a", 1, 8)] and second.num_computed == 8 and second.num_tokens == 1
    assert len(second.rows[0].sequence.pages[0]) == 4, "of all 5 + 8 tokens"
    deltas = s.commit(first, device.launch(first), 0.0)
    s.add(request("b", range(3), max_tokens=3), 0.0)
    third = s.plan(0.0)
    assert counts(third) == [("a", 1, 1), ("b", 3, 1)], "a prompt and a free slot go first"
    s.add(request("c", range(3), max_tokens=3), 0.0)
    deltas += s.commit(second, device.launch(second), 0.0)
    assert [len(d.token_ids) for d in deltas] == [1, 8]
    fourth = s.plan(0.0)
    assert counts(fourth) == [("a", 1, 8), ("b", 1, 2)], "c has no slot until b is done"
    s.commit(third, device.launch(third), 0.0)
    fifth = s.plan(0.0)
    assert counts(fifth) == [("a", 1, 1)], "with the next commit there is a slot for c"
    deltas += s.commit(fourth, device.launch(fourth), 0.0) + s.commit(fifth, device.launch(fifth), 0.0)
    assert output(deltas + run(s, device), "c") == expected("c", 3, 3)


def test_steps_end_where_a_sequence_does_and_at_stop_ids():
    s, device = scheduler(pages=40, length=60, most_steps=lambda seqs: 16), Device(40, 4)
    stop = next_token("a", 0, 9)
    s.add(request("a", range(4), max_tokens=40, stop_token_ids=(stop,)), 0.0)
    s.add(request("b", range(4), max_tokens=12), 0.0)
    deltas = run(s, device)
    want = expected("a", 4, 40)
    assert output(deltas, "a") == want[: want.index(stop) + 1] and output(deltas, "b") == expected("b", 4, 12)
    assert [d.finish for d in deltas if d.finish] == [FinishReason.STOP, FinishReason.LENGTH]
    assert s.stats.generated_tokens == want.index(stop) + 1 + 12 and not s.stats.discarded_tokens


@pytest.mark.parametrize("count", range(1, 14))
def test_what_a_stop_id_left_uncomputed_is_not_shared(count):
    """A sequence ends in the midst of a launch: its last token has no keys and values, wherever a page ends."""
    s, device = scheduler(pages=64, length=60, most_steps=lambda seqs: 16), Device(64, 4)
    said = expected("a", 5, count)
    s.add(request("a", range(5), max_tokens=40, stop_token_ids=(said[-1],)), 0.0)
    run(s, device)
    s.add(request("a", [*range(5), *said, 7, 7, 7, 7, 7], max_tokens=2), 0.0)
    run(s, device)  # the device compares every key with what the sequence says
    assert s.stats.hit_tokens


def test_pages_that_are_short_give_fewer_steps():
    s, device = scheduler(pages=8, size=2, seqs=2, budget=8, length=16, most_steps=lambda seqs: 16), Device(8, 2)
    for name, first in (("a", 0), ("b", 10)):
        s.add(request(name, range(first, first + 3), max_tokens=12), 0.0)
    plan = s.plan(0.0)
    follow = s.plan(0.0)
    assert counts(follow) == [("a", 1, 5), ("b", 1, 5)], "8 pages of 2 for two of 3 + 5"
    deltas = s.commit(plan, device.launch(plan), 0.0) + s.commit(follow, device.launch(follow), 0.0)
    deltas += run(s, device)
    assert s.stats.preemptions > 0
    assert output(deltas, "a") == expected("a", 3, 12) and output(deltas, "b") == expected("b", 3, 12)


def crowd(s, device, count, max_tokens=12):
    """Has `count` sequences decode; their prompts are of one token each."""
    for i in range(count):
        s.add(request(f"decode{i}", [i], max_tokens=max_tokens), 0.0)
    plan = s.plan(0.0)
    s.commit(plan, device.launch(plan), 0.0)


def steps(s, device, count):
    """The decodes and the prompts' tokens of the next steps."""
    found = []
    for _ in range(count):
        plan = s.plan(0.0)
        found.append((plan.num_single, plan.num_tokens - plan.num_single))
        s.commit(plan, device.launch(plan), 0.0)
        s.check_integrity()
    return found


def test_decodes_sit_out_two_steps_of_three_that_prompts_fill():
    s, device = scheduler(pages=100, seqs=6, budget=16, length=64), Device(100, 4)
    crowd(s, device, 4)
    s.add(request("long", range(50), max_tokens=2), 0.0)
    assert steps(s, device, 5) == [(0, 16), (0, 16), (4, 12), (4, 6), (5, 0)]
    deltas = run(s, device)
    assert s.stats.generated_tokens == 4 * 12 + 2
    assert output(deltas, "decode3") == expected("decode3", 1, 12)[4:]


def test_few_decodes_never_sit_out():
    s, device = scheduler(pages=100, seqs=6, budget=16, length=64), Device(100, 4)
    crowd(s, device, 3)
    s.add(request("long", range(50), max_tokens=2), 0.0)
    assert steps(s, device, 2) == [(3, 13), (3, 13)]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": 15},  # fills no step
        {"priorities": True},
        {"pages": 11},  # four of them are taken, seven hold less than two steps
    ],
    ids=str,
)
def test_decodes_sit_out_for_nothing_less(options):
    prompt = options.pop("prompt", 20)
    s, device = scheduler(**{"pages": 100, "seqs": 6, "budget": 16, **options}), Device(100, 4)
    crowd(s, device, 4)
    s.add(request("next", range(prompt), max_tokens=2), 0.0)
    assert [single for single, _ in steps(s, device, 2)] == [4] * 2


def test_decodes_sit_out_for_what_is_not_in_the_cache_already():
    s, device = scheduler(pages=100, seqs=7, budget=16), Device(100, 4)
    s.add(request("first", range(32), max_tokens=1), 0.0)
    run(s, device)
    crowd(s, device, 4)
    s.add(request("again", range(32), max_tokens=2), 0.0)
    assert steps(s, device, 1) == [(4, 4)]
    s.add(request("other", range(1, 33), max_tokens=2), 0.0)
    assert steps(s, device, 1) == [(0, 16)]


def test_decodes_do_not_sit_out_for_who_has_no_slot():
    s, device = scheduler(pages=100, seqs=5, budget=16), Device(100, 4)
    crowd(s, device, 4)
    s.add(request("last", range(20), max_tokens=2), 0.0)
    s.add(request("next", range(20, 40), max_tokens=2), 0.0)
    assert steps(s, device, 2) == [(0, 16), (4, 4)]


def test_decodes_go_on_when_the_prompts_they_would_sit_out_for_cannot():
    """The prompt needs more pages than are free, though its first steps would not."""
    s, device = scheduler(pages=22, seqs=6, budget=16, length=80), Device(22, 4)
    crowd(s, device, 4)
    s.add(request("long", range(76), max_tokens=2), 0.0)
    assert steps(s, device, 3) == [(4, 0)] * 3
    deltas = run(s, device)
    assert output(deltas, "long") == expected("long", 76, 2)


def test_a_long_prompt_passes_through_a_window():
    """200 tokens take 50 pages of the layers that see all, and of those that see 8 only what a chunk does."""
    windows = (None, 8)
    s, device = scheduler(pages=58, length=220, windows=windows), Device(58, 4, windows)
    s.add(request("a", range(200), max_tokens=20), 0.0)
    most, pending, deltas = 0, None, []
    while not s.idle:
        plan = s.plan(0.0)
        launched = (plan, device.launch(plan)) if plan else None
        most = max(most, s.pages.num_pages - s.pages.available)
        deltas += s.commit(*pending, 0.0) if pending else []
        pending = launched
        s.check_integrity()
    assert output(deltas, "a") == expected("a", 200, 20)
    assert most == 55 + 3, "all blocks, and the three that 8 tokens can lie in"
    assert s.stats.preemptions == 0


@pytest.mark.parametrize("windows", [(None, 8), (8,), (None, 8, 8, 20)])
def test_a_hit_has_all_that_comes_after_it_sees(windows):
    s, device = scheduler(pages=64, length=100, windows=windows), Device(64, 4, windows)
    for name, cached in (("a", 0), ("b", 48), ("c", 48)):  # the device asserts that what is read is right
        s.add(request(name, range(50), max_tokens=3), 0.0)
        deltas = run(s, device)
        assert output(deltas, name) == expected(name, 50, 3) and deltas[0].num_cached_tokens == cached
    s.add(request("branch", [*range(33), *[7] * 9], max_tokens=3), 0.0)
    deltas = run(s, device)  # the pages of the windows before block 8 were given up, and are kept while there is room
    assert deltas[0].num_cached_tokens == 32 and output(deltas, "branch") == expected("branch", 42, 3)


def test_of_a_prompt_that_lost_a_window_no_more_than_the_rest_is_a_hit():
    windows = (None, 8)
    s, device = scheduler(pages=40, length=100, windows=windows), Device(40, 4, windows)
    s.add(request("a", range(50), max_tokens=3), 0.0)
    run(s, device)
    hashes = block_hashes(range(50), 4, "")
    assert s.tables.known(hashes) == 12
    taken = s.pages.take(40 - 13 - 3)  # the pages that fell out of the window first, and some that were free
    assert s.tables.known(hashes) == 12 and s.tables.known(hashes[:8]) == 0
    s.pages.release(taken)
    s.add(request("b", range(35), max_tokens=3), 0.0)
    deltas = run(s, device)
    assert deltas[0].num_cached_tokens == 0 and output(deltas, "b") == expected("b", 35, 3)


def test_the_same_memory_holds_more_sequences():
    """Five of six groups of layers see 16 tokens: eight sequences of 128 fit where two would."""
    windows = (None, *[16] * 5)
    for held, running in ((windows, 8), ((None,) * 6, 2)):
        s, device = scheduler(6 * 80, seqs=8, budget=512, length=128, windows=held), Device(6 * 80, 4, held)
        for name in "abcdefgh":
            s.add(request(name, [ord(name)] * 64, max_tokens=64), 0.0)
        together, pending = [], None
        while not s.idle:
            plan = s.plan(0.0)
            together.append(sum(q.num_computed > 120 for q in s.running))
            launched = (plan, device.launch(plan)) if plan else None
            if pending:
                s.commit(*pending, 0.0)
            pending = launched
        assert max(together) == running


WINDOWS = [(None, 7), (5,), (None, 3, 3, 12), (4, 9)]
EVENTS = [*((seed, (None,), 10_000) for seed in range(20)), *((seed, WINDOWS[seed % 4], 1_500) for seed in range(8))]


@pytest.mark.parametrize(("seed", "windows", "events"), EVENTS, ids=str)
def test_thousands_of_random_events(seed, windows, events):
    """Arrivals, aborts, deadlines, preemptions, prefix hits: every page and slot accounted for after each event."""
    rng = random.Random(seed)
    size, pages = rng.choice([(1, 30), (4, 12), (4, 60), (16, 8)])
    pages *= 1 + len(windows) // 3
    length = longest(windows, pages, size, 40)
    seqs = rng.choice([1, 3, 8])
    s = scheduler(
        pages, size, seqs, budget=rng.choice([seqs, 8 + seqs, 64]), length=length,
        max_queued_requests=12, priorities=rng.random() < 0.5, prefix_caching=rng.random() < 0.8, windows=windows,
        most_steps=lambda seqs: (1, 4, 16)[seed % 3],
    )  # fmt: skip
    device, pending, now = Device(pages, size, windows), None, 0.0
    asked, got, ended, scored = {}, {}, {}, set()
    prefixes = [[rng.randrange(50) for _ in range(rng.randrange(1, 25))] for _ in range(4)]

    def hear(deltas):
        for d in deltas:
            key = (d.request_id, d.index)
            assert key not in ended, "a delta after the last one"
            got.setdefault(key, []).extend(d.token_ids)
            if d.prompt_logprobs is not None:
                r = asked[d.request_id]
                assert d.prompt_logprobs == scores(r.prompt_token_ids, r.params.prompt_logprobs_from)
                scored.add(key)
            if d.finish is not None:
                ended[key] = d.finish

    for event in range(events):
        now += rng.random()
        draw = rng.random()
        if draw < 0.25:
            prompt = rng.choice(prefixes)[: rng.randrange(1, 25)] + [rng.randrange(50)] * rng.randrange(1, 4)
            prompt = prompt[: length - 1]
            r = request(
                str(event), prompt, n=rng.choice([1, 1, 1, 3]), max_tokens=rng.randrange(0, length - len(prompt) + 1),
                stop_token_ids=tuple(rng.sample(range(50), rng.choice([0, 2, 9]))), priority=rng.randrange(3),
                timeout_s=rng.choice([None, 30.0]), cache_salt=rng.choice(["", "", "x"]),
                **rng.choice([{}, {"prompt_logprobs": 0, "prompt_logprobs_from": rng.randrange(len(prompt))}]),
            )  # fmt: skip
            with suppress(Overloaded):
                s.add(r, now)
                asked[r.id] = r
        elif draw < 0.30 and asked:
            s.abort(rng.choice(list(asked)[-20:]))
        elif draw < 0.32:
            hear(s.expire(now))
        else:
            plan = s.plan(now)
            launched = (plan, device.launch(plan)) if plan else None
            if pending:
                hear(s.commit(*pending, now))
            pending = launched
        s.check_integrity()
    hear(s.commit(*pending, now) if pending else [])
    hear(run(s, device))
    assert len(ended) > 50 and s.pages.usage == 0
    assert s.prefix_caching or not s.pages._by_hash, "pages are named for nobody"
    for (name, index), tokens in got.items():
        r = asked[name]
        if index == 0 and r.params.prompt_logprobs is not None:
            assert (name, index) in scored or ended.get((name, index)) in (FinishReason.ERROR, None)
        want = expected(name, len(r.prompt_token_ids), r.params.max_tokens, index)
        stop = next((i for i, t in enumerate(want) if t in r.params.stop_token_ids), len(want) - 1)
        assert tokens == want[: len(tokens)], "another's tokens"
        if ended.get((name, index)) in (FinishReason.STOP, FinishReason.LENGTH):
            assert len(tokens) == stop + 1
