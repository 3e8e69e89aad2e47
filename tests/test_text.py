"""Text in, text out, against an engine that sends prepared deltas and a tokenizer of one token a byte."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

import pytest
from fake_engine import BOS, EOS, IM_END, VOCAB_SIZE, fake_info, ids_of, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineStopped,
    InvalidParameter,
    JaxserveError,
    PromptTooLong,
    UnsupportedParameter,
)
from jaxserve.request import Delta, FinishReason, Logprobs, Request, SamplingParams
from jaxserve.text import TextDelta, TextModel, TokenLogprob

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


class ScriptedEngine:
    """An EngineClient that answers every request with the same deltas; an exception among them is raised."""

    def __init__(self, *script: Delta | BaseException):
        self.script = script
        self.requests: list[Request] = []
        self.sent = 0
        self.aborted = False
        self.loaded = True

    @property
    def info(self):
        if not self.loaded:
            raise EngineStopped("the engine is loading")
        return fake_info()

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        try:
            for item in self.script:
                await asyncio.sleep(0)
                if isinstance(item, BaseException):
                    raise item
                self.sent += 1
                yield item
        except GeneratorExit:
            self.aborted = True
            raise


class CountingMetrics:
    def __init__(self):
        self.calls: list[tuple] = []

    def track(self, arrival: float) -> "CountingMetrics":
        return self

    def tokens(self, count: int) -> None:
        self.calls.append(("tokens", count))

    def finish(self, reason: str, prompt_tokens: int, completion_tokens: list[int]) -> None:
        self.calls.append((reason, prompt_tokens, sum(completion_tokens)))

    @property
    def ends(self) -> list[tuple]:
        return [c for c in self.calls if c[0] != "tokens"]


def said(text: str, *, index: int = 0, **known) -> Delta:
    return Delta("r", index=index, token_ids=ids_of(text), **known)


def ended(token_id: int = EOS, *, index: int = 0, **known) -> Delta:
    return Delta("r", index=index, token_ids=(token_id,), finish=STOP, stop_token_id=token_id, **known)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("model"))


def make(path, *script):
    model = TextModel.open(path, ScriptedEngine(*script), "toy")
    model.metrics = CountingMetrics()
    return model


def run(model: TextModel, params: SamplingParams | None = None, prompt: Sequence[int] = ids_of("p")) -> list[TextDelta]:
    async def collect() -> list[TextDelta]:
        return [d async for d in model.generate(prompt, params or SamplingParams(), request_id="r")]

    return asyncio.run(collect())


def text_of(deltas: Sequence[TextDelta], index: int = 0) -> str:
    return "".join(d.text for d in deltas if d.index == index)


# --- opening


def test_a_model_is_opened_from_its_directory(path):
    model = make(path)
    assert (model.name, model.eos_token_ids) == ("toy", (EOS, IM_END))
    assert model.defaults == SamplingParams(temperature=0.7, max_tokens=None)
    assert model.encode_prompt("hi</s>") == (*ids_of("hi"), EOS)
    assert model.encode_prompt("hi</s>", parse_special=False) == ids_of("hi</s>")
    chat = model.encode_chat([{"role": "user", "content": "</s>"}])
    assert EOS not in chat and chat[-1] == ids_of("\n")[0]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, SamplingParams(max_tokens=None)),
        (
            {"do_sample": False, "top_k": 20, "top_p": 0.9, "min_p": None},
            SamplingParams(top_k=20, top_p=0.9, max_tokens=None),
        ),
        (
            {"repetition_penalty": 1.1, "min_p": 0.1, "typical_p": 0.2},
            SamplingParams(repetition_penalty=1.1, min_p=0.1, max_tokens=None),
        ),
        ({"max_new_tokens": 7, "max_length": 100}, SamplingParams(max_tokens=7)),
    ],
)
def test_generation_defaults(tmp_path, generation, expected):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = make(tmp_path)
    assert model.defaults == expected
    assert model.eos_token_ids == (EOS,)  # config.json's


@pytest.mark.parametrize("generation", ['{"temperature": "hot"}', '{"top_p": 7}', "[", '{"eos_token_id": "x"}'])
def test_wrong_generation_defaults_are_named(tmp_path, generation):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(generation)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        make(tmp_path)


def test_chat_needs_a_template(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UnsupportedParameter, match="chat_template.jinja"):
        make(tmp_path).encode_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "chat_template", "tokenizer"])
def test_variables_that_are_parameters_are_refused(path, name):
    with pytest.raises(InvalidParameter) as caught:
        make(path).encode_chat([{"role": "user", "content": "x"}], template_kwargs={name: []})
    assert caught.value.param == "chat_template_kwargs"


# --- what comes out


def test_text_as_it_comes(path):
    model = make(path, said("a", num_cached_tokens=3), said("bc"), ended())
    assert run(model) == [
        TextDelta(index=0, text="a", token_ids=ids_of("a"), logprobs=None, num_cached_tokens=3),
        TextDelta(index=0, text="bc", token_ids=ids_of("bc"), logprobs=None),
        TextDelta(index=0, text="", token_ids=(EOS,), logprobs=None, finish=STOP),
    ]
    (request,) = model.client.requests
    assert request.eos_token_ids == (EOS, IM_END)
    assert model.metrics.calls == [("tokens", 1), ("tokens", 2), ("tokens", 1), ("stop", 1, 4)]
    assert not model.client.aborted


def test_request_fields_reach_the_engine(path):
    model = make(path, ended())

    async def once() -> None:
        params = SamplingParams(seed=1)
        generator = model.generate([5], params, request_id="x", priority=-1, timeout_s=2.5, cache_salt="s")
        assert [d.finish async for d in generator] == [STOP]

    asyncio.run(once())
    (request,) = model.client.requests
    assert (request.id, request.priority, request.timeout_s, request.cache_salt) == ("x", -1, 2.5, "s")
    assert request.prompt_token_ids == (5,) and request.params.seed == 1


def test_a_character_comes_whole_and_what_is_left_is_flushed(path):
    first, second = ids_of("é")
    deltas = run(make(path, Delta("r", token_ids=(first,)), Delta("r", token_ids=(second, first), finish=LENGTH)))
    assert [d.text for d in deltas] == ["", "é\ufffd"]
    assert [d.token_ids for d in deltas] == [(first,), (second, first)]


def test_a_character_begun_in_the_prompt_is_finished(path):
    first, second = ids_of("é")
    deltas = run(make(path, Delta("r", token_ids=(second,), finish=LENGTH)), prompt=[BOS, first])
    assert text_of(deltas) == "é"


@pytest.mark.parametrize(
    ("params", "token", "text", "reason"),
    [
        ({}, EOS, "a", None),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, EOS, "a</s>", None),
        ({"skip_special_tokens": False}, EOS, "a", None),
        ({"stop_token_ids": ids_of("x")}, ids_of("x")[0], "a", ids_of("x")[0]),
        ({"stop_token_ids": ids_of("x"), "include_stop_str_in_output": True}, ids_of("x")[0], "ax", ids_of("x")[0]),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, EOS, "a", EOS),
        ({"stop_token_ids": (EOS,)}, EOS, "a", None),
    ],
)
def test_the_token_that_ends_it(path, params, token, text, reason):
    deltas = run(make(path, said("a"), ended(token)), SamplingParams(**params))
    assert text_of(deltas) == text
    assert deltas[-1].token_ids == (token,)
    assert (deltas[-1].finish, deltas[-1].stop_reason) == (STOP, reason)


def test_logprobs_have_text_and_bytes(path):
    first = ids_of("é")[0]
    entries = (Logprobs(-0.5, 1, (first, EOS), (-0.5, -1.0)),)
    prompt = (None, Logprobs(-2.0, 3))
    script = Delta("r", token_ids=(first,), logprobs=entries, prompt_logprobs=prompt, finish=LENGTH)
    (delta,) = run(make(path, script), prompt=ids_of("pq"))
    top = (TokenLogprob(first, "\ufffd", b"\xc3", -0.5, 1), TokenLogprob(EOS, "</s>", b"</s>", -1.0, 2))
    assert delta.logprobs == (TokenLogprob(first, "\ufffd", b"\xc3", -0.5, 1, top),)
    assert delta.prompt_logprobs == (None, TokenLogprob(ids_of("q")[0], "q", b"q", -2.0, 3))


def test_scoring_a_prompt_gives_no_text(path):
    script = Delta("r", prompt_logprobs=(None,), finish=LENGTH)
    (delta,) = run(make(path, script), SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert (delta.text, delta.token_ids, delta.prompt_logprobs) == ("", (), (None,))


# --- stop strings


def test_a_stop_string_ends_the_text_and_the_work(path):
    entries = tuple(Logprobs(-1.0, 1) for _ in "bENDx")
    model = make(path, said("aE"), said("bENDx", logprobs=entries), said("never"))
    deltas = run(model, SamplingParams(stop=("END",)))
    assert [d.text for d in deltas] == ["a", "Eb"]
    last = deltas[-1]
    assert (last.finish, last.stop_reason, last.token_ids) == (STOP, "END", ids_of("bEND"))
    assert len(last.logprobs) == 4
    assert model.client.aborted and model.client.sent == 2
    assert model.metrics.ends == [("stop", 1, 6)]


def test_a_stop_string_may_be_included(path):
    deltas = run(make(path, said("aENDx")), SamplingParams(stop=("END",), include_stop_str_in_output=True))
    assert text_of(deltas) == "aEND"


def test_what_a_stop_string_held_back_comes_at_the_end(path):
    model = make(path, said("aEN"), ended())
    deltas = run(model, SamplingParams(stop=("END",)))
    assert [d.text for d in deltas] == ["a", "EN"]
    assert (deltas[-1].finish, deltas[-1].stop_reason) == (STOP, None)
    assert not model.client.aborted


def test_a_stop_string_in_the_last_delta(path):
    model = make(path, said("aENDx", finish=LENGTH))
    (delta,) = run(model, SamplingParams(stop=("END",)))
    assert (delta.text, delta.finish, delta.stop_reason, delta.token_ids) == ("a", STOP, "END", ids_of("aEND"))
    assert not model.client.aborted


def test_each_sequence_stops_by_itself(path):
    model = make(
        path,
        said("aEND", index=0),
        said("bc", index=1),
        said("more", index=0),
        said("dEND", index=1),
        said("never", index=0),
    )
    deltas = run(model, SamplingParams(n=2, stop=("END",)))
    assert [(d.index, d.text, d.finish) for d in deltas] == [(0, "a", STOP), (1, "bc", None), (1, "d", STOP)]
    assert model.client.aborted and model.client.sent == 4
    assert model.metrics.ends == [("stop", 1, 10)]


def test_one_stops_by_a_string_and_one_by_itself(path):
    model = make(path, said("aEND", index=0), said("bc", index=1, finish=LENGTH), said("more", index=0))
    deltas = run(model, SamplingParams(n=2, stop=("END",)))
    assert [(d.index, d.text, d.finish) for d in deltas] == [(0, "a", STOP), (1, "bc", LENGTH)]
    assert model.client.aborted and model.client.sent == 2


@pytest.mark.parametrize(
    ("min_tokens", "text"),
    [(0, ""), (1, ""), (2, "abc"), (4, "abc"), (5, "abcab"), (9, "abcababc"), (10, "abcababcab")],
)
def test_stop_strings_wait_for_min_tokens(path, min_tokens, text):
    """In abcababcab, "ab" ends with tokens 2, 5, 7 and 10; the first of them behind min_tokens stops."""
    for script in ([said("abcababcab", finish=LENGTH)], [*map(said, "abcababca"), said("b", finish=LENGTH)]):
        deltas = run(make(path, *script), SamplingParams(stop=("ab",), min_tokens=min_tokens))
        assert text_of(deltas) == text
        assert deltas[-1].stop_reason == ("ab" if min_tokens < 10 else None)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("abé", max_size=12),
    stop=st.lists(st.text("abé", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 24)),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
)
def test_every_split_of_the_deltas_gives_the_same(path, text, stop, cuts, include, min_tokens):
    params = SamplingParams(stop=tuple(stop), include_stop_str_in_output=include, min_tokens=min_tokens)
    ids = ids_of(text)
    bounds = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    pieces = [Delta("r", token_ids=ids[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    end = Delta("r", finish=LENGTH)
    split, whole = run(make(path, *pieces, end), params), run(make(path, Delta("r", token_ids=ids), end), params)
    for deltas in (split, whole):
        assert [d.finish for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert text_of(split) == text_of(whole)
    assert [i for d in split for i in d.token_ids] == [i for d in whole for i in d.token_ids]
    assert (split[-1].finish, split[-1].stop_reason) == (whole[-1].finish, whole[-1].stop_reason)
    if whole[-1].stop_reason is None:
        assert text_of(whole) == text


# --- ends that are none


def test_a_request_that_cannot_be_served_is_refused_at_once(path):
    model = make(path)
    for error, prompt, params in (
        (InvalidParameter, [], SamplingParams()),
        (InvalidParameter, [VOCAB_SIZE], SamplingParams()),
        (PromptTooLong, [5] * 10, SamplingParams(max_tokens=10_000)),
    ):
        with pytest.raises(error):
            model.generate(prompt, params, request_id="r")
    model.client.loaded = False
    with pytest.raises(EngineStopped):
        model.generate([5], SamplingParams(), request_id="r")
    assert not model.client.requests and not model.metrics.calls


@pytest.mark.parametrize("error", [EngineStopped("gone"), DeadlineExceeded("late"), JaxserveError("bug")])
def test_an_error_of_the_engine_is_raised_and_counted(path, error):
    model = make(path, said("a"), error)
    with pytest.raises(type(error)):
        run(model)
    assert model.metrics.ends == [("error", 1, 1)]


def test_closing_aborts_the_work(path):
    model = make(path, said("a"), said("b"), ended())

    async def leave() -> None:
        generator = model.generate([5], SamplingParams(), request_id="r")
        assert (await anext(generator)).text == "a"
        await generator.aclose()

    asyncio.run(leave())
    assert model.client.aborted
    assert model.metrics.ends == [("abort", 1, 1)]


def test_cancelling_aborts_the_work(path):
    model = make(path, said("a"), said("b"), ended())

    async def leave() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in model.generate([5], SamplingParams(), request_id="r"):
                started.set()
                await asyncio.sleep(3600)

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.get_running_loop().shutdown_asyncgens()

    asyncio.run(leave())
    assert model.client.aborted
    assert model.metrics.ends == [("abort", 1, 1)]


def test_leaving_after_the_last_delta_is_no_abort(path):
    model = make(path, said("a"), ended())

    async def leave() -> None:
        generator = model.generate([5], SamplingParams(), request_id="r")
        async for delta in generator:
            if delta.finish is not None:
                break
        await generator.aclose()

    asyncio.run(leave())
    assert model.metrics.ends == [("stop", 1, 2)]
