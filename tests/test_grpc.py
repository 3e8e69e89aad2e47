"""gRPC Generate and its refusals as clients see them: real channels to a real server."""

import asyncio
import json
import math
from pathlib import Path

import grpc
import pytest
from fake_engine import EOS, FIRST_BYTE, IM_END, VOCAB_SIZE, FakeEngine, ids_of, write_tokenizer
from grpc_running import ids, running, score_request, text_request

from jaxserve.client import EngineState
from jaxserve.errors import DeadlineExceeded, EngineStopped, Overloaded
from jaxserve.request import SamplingParams
from jaxserve.server.proto import jaxserve_v1_pb2 as pb
from jaxserve.server.proto.translate import PROMPT_LOGPROBS_PER_MESSAGE


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("toy"))


def test_text_in_text_out(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            request = text_request("abc", max_tokens=4)
            request.request_id = "mine"
            messages = await r.generate(request)
            assert "".join(m.text for m in messages) == "defg"
            assert [i for m in messages for i in m.token_ids] == list(ids_of("defg"))
            assert messages[0].prompt == pb.PromptInfo(request_id="mine", model="toy")
            assert [m.HasField("prompt") for m in messages[1:]] == [False] * (len(messages) - 1)
            assert messages[-1].finish == pb.Finish(reason=pb.FINISH_REASON_LENGTH)
            assert messages[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=4)
            assert not any(m.HasField("finish") or m.HasField("usage") for m in messages[:-1])
            assert r.engine.requests[0].prompt_token_ids == ids_of("abc")
            assert r.engine.requests[0].id.startswith("mine-")

    asyncio.run(main())


def test_token_ids_in_token_ids_out(toy: Path) -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.num_cached_tokens = 2
        async with running(toy, engine) as r:
            messages = await r.generate(
                pb.GenerateRequest(
                    model="toy",
                    prompt=pb.Prompt(token_ids=ids("abc")),
                    params=pb.SamplingParams(max_tokens=3),
                    response=pb.ResponseOptions(text=False, prompt_token_ids=True),
                )
            )
            assert [i for m in messages for i in m.token_ids] == list(ids_of("def"))
            assert not any(m.text for m in messages)
            assert tuple(messages[0].prompt.token_ids) == ids_of("abc")
            assert messages[0].prompt.request_id
            assert messages[-1].usage.cached_tokens == 2

            messages = await r.generate(
                pb.GenerateRequest(
                    prompt=pb.Prompt(token_ids=ids("abc")),
                    params=pb.SamplingParams(max_tokens=16),
                    response=pb.ResponseOptions(token_ids=False),
                )
            )
            assert "".join(m.text for m in messages) == "defghijklmnopqrs"
            assert not any(m.token_ids for m in messages)
            assert messages[-1].usage.completion_tokens == 16

    asyncio.run(main())


def test_what_was_not_asked_for_is_not_sent(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            request = text_request("abc", max_tokens=4)
            request.response.text = request.response.token_ids = False
            first, last = await r.generate(request)
            assert first.HasField("prompt") and not first.text and not first.token_ids
            assert last.usage.completion_tokens == 4

    asyncio.run(main())


def test_chat(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi <|im_end|>")])
            messages = await r.generate(
                pb.GenerateRequest(prompt=pb.Prompt(chat=chat), params=pb.SamplingParams(max_tokens=1))
            )
            assert messages[-1].usage.completion_tokens == 1
            seen = r.engine.requests[0].prompt_token_ids
            assert seen.count(IM_END) == 1, "the one in the content is text"
            assert seen[-len("assistant\n") :] == ids_of("assistant\n")

            chat.chat_template_kwargs["enable_thinking"] = False
            assert await r.generate(pb.GenerateRequest(prompt=pb.Prompt(chat=chat)))

            chat.continue_final_message = True
            chat.messages[0].role = "assistant"
            chat.messages[0].content = "abc"
            messages = await r.generate(pb.GenerateRequest(prompt=pb.Prompt(chat=chat)))
            assert r.engine.requests[-1].prompt_token_ids[-3:] == ids_of("abc")
            assert messages[-1].HasField("finish")

    asyncio.run(main())


EVERY_PARAM = dict(
    n=2,
    max_tokens=5,
    min_tokens=2,
    temperature=0.3,
    top_k=7,
    top_p=0.6,
    min_p=0.05,
    repetition_penalty=1.25,
    presence_penalty=-0.5,
    frequency_penalty=0.75,
    logit_bias={5: -3.5, 7: 2.0},
    allowed_token_ids=tuple(range(4, 200)),
    banned_token_ids=(9, 8),
    stop=("zz", "é"),
    stop_token_ids=(250,),
    ignore_eos=True,
    include_stop_str_in_output=True,
    skip_special_tokens=False,
    seed=-12345678901234,
    logprobs=3,
    prompt_logprobs=0,
    prompt_logprobs_from=1,
)


def test_every_sampling_parameter_is_in_the_proto_and_reaches_the_engine(toy: Path) -> None:
    fields = set(SamplingParams.__struct_fields__)
    assert {f.name for f in pb.SamplingParams.DESCRIPTOR.fields} == fields
    assert EVERY_PARAM.keys() == fields, "this test sets every field"
    plain = SamplingParams()
    assert all(getattr(plain, name) != value for name, value in EVERY_PARAM.items())
    assert all(f.is_repeated or f.has_presence for f in pb.SamplingParams.DESCRIPTOR.fields)

    async def main() -> None:
        async with running(toy) as r:
            request = text_request("abc", **EVERY_PARAM)
            request.priority = -3
            request.cache_salt = "salt"
            await r.generate(request)
            seen = r.engine.requests[0]
            for name, value in EVERY_PARAM.items():
                assert getattr(seen.params, name) == value, name
            assert (seen.priority, seen.cache_salt, seen.timeout_s) == (-3, "salt", None)

    asyncio.run(main())


def test_unset_parameters_are_the_models_defaults(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            await r.generate(text_request("abc"))
            await r.generate(text_request("abc", temperature=0.0, n=1, max_tokens=0))
            first, second = r.engine.requests
            assert first.params == SamplingParams(temperature=0.7, max_tokens=None), "generation_config.json's"
            assert second.params == SamplingParams(temperature=0.0, max_tokens=0), "a zero is not an unset field"

    asyncio.run(main())


def test_logprobs(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            messages = await r.generate(text_request("ab", max_tokens=2, logprobs=2, prompt_logprobs=1))
            got = [entry for m in messages for entry in m.logprobs]
            assert [(e.token_id, e.token, e.bytes, e.logprob, e.rank) for e in got] == [
                (*ids_of("c"), "c", b"c", -0.25, 1),
                (*ids_of("d"), "d", b"d", -0.25, 1),
            ]
            assert [(e.token, e.logprob) for e in got[0].top] == [("c", -0.25), ("d", -1.25)]
            first, second = messages[0].prompt.logprobs
            assert (first.token, first.HasField("logprob")) == ("a", False)
            assert (second.token, second.logprob, second.rank) == ("b", -1.25, 2)
            assert [e.token for e in second.top] == ["c"]

    asyncio.run(main())


def test_long_prompt_logprobs_come_in_parts(toy: Path) -> None:
    async def main() -> None:
        async with running(toy, FakeEngine(max_model_len=8192)) as r:
            prompt = [FIRST_BYTE + i % 200 for i in range(2 * PROMPT_LOGPROBS_PER_MESSAGE + 5)]
            messages = await r.generate(
                pb.GenerateRequest(
                    prompt=pb.Prompt(token_ids=pb.TokenIds(ids=prompt)),
                    params=pb.SamplingParams(max_tokens=0, prompt_logprobs=20),
                    response=pb.ResponseOptions(prompt_token_ids=True),
                )
            )
            assert [len(m.prompt.logprobs) for m in messages] == [PROMPT_LOGPROBS_PER_MESSAGE] * 2 + [5]
            assert [e.token_id for m in messages for e in m.prompt.logprobs] == prompt
            assert list(messages[0].prompt.token_ids) == prompt and not messages[1].prompt.token_ids
            assert messages[-1].usage == pb.Usage(prompt_tokens=len(prompt))

    asyncio.run(main())


def test_what_ended_it(toy: Path) -> None:
    async def main() -> None:
        async with running(toy, FakeEngine(script=lambda request, k: ids_of("hello world"))) as r:
            messages = await r.generate(text_request(max_tokens=-1))
            assert "".join(m.text for m in messages) == "hello world"
            finish = messages[-1].finish
            assert (finish.reason, finish.WhichOneof("stopped_by")) == (pb.FINISH_REASON_STOP, "eos_token_id")
            assert finish.eos_token_id in (EOS, IM_END)

            messages = await r.generate(text_request(max_tokens=-1, stop=["o w"]))
            assert "".join(m.text for m in messages) == "hell"
            assert messages[-1].finish == pb.Finish(reason=pb.FINISH_REASON_STOP, stop_string="o w")

            messages = await r.generate(text_request(max_tokens=-1, stop_token_ids=ids_of("w")))
            assert messages[-1].finish == pb.Finish(reason=pb.FINISH_REASON_STOP, stop_token_id=ids_of("w")[0])

    asyncio.run(main())


def test_n_continuations(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            messages = await r.generate(text_request("abc", n=3, max_tokens=4))
            texts = ["".join(m.text for m in messages if m.index == k) for k in range(3)]
            assert texts == ["defg", "efgh", "fghi"]
            assert sorted(m.index for m in messages if m.HasField("finish")) == [0, 1, 2]
            assert [m.usage.completion_tokens for m in messages if m.HasField("usage")] == [12]
            assert messages[-1].HasField("usage")

    asyncio.run(main())


def test_many_at_once(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            prompts = [chr(ord("a") + i % 20) for i in range(64)]
            answers = await asyncio.gather(*(r.generate(text_request(p, max_tokens=5)) for p in prompts))
            for prompt, messages in zip(prompts, answers, strict=True):
                expected = "".join(chr(ord(prompt) + 1 + i) for i in range(5))
                assert "".join(m.text for m in messages) == expected
            assert len({m[0].prompt.request_id for m in answers}) == 64

    asyncio.run(main())


# Refusals


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (text_request(temperature=-1.0), "INVALID_ARGUMENT", "temperature"),
        (text_request(temperature=math.nan), "INVALID_ARGUMENT", "temperature"),
        (text_request(n=129), "INVALID_ARGUMENT", "n"),
        (text_request(n=0), "INVALID_ARGUMENT", "n"),
        (text_request(max_tokens=-2), "INVALID_ARGUMENT", "max_tokens"),
        (text_request(min_tokens=2**32 - 1, max_tokens=-1), "INVALID_ARGUMENT", "min_tokens"),
        (text_request(min_tokens=17, max_tokens=16), "INVALID_ARGUMENT", "min_tokens"),
        (text_request(stop=[""]), "INVALID_ARGUMENT", "stop"),
        (text_request(logit_bias={2**32 - 1: 1.0}), "INVALID_ARGUMENT", "logit_bias"),
        (text_request(logit_bias={VOCAB_SIZE: 1.0}), "INVALID_ARGUMENT", "logit_bias"),
        (text_request(max_tokens=100_000), "INVALID_ARGUMENT", "prompt"),
        (text_request("x" * 40_000), "INVALID_ARGUMENT", "prompt"),
        (text_request(""), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds())), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[2**32 - 1]))), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(prompt=pb.Prompt(chat=pb.Chat())), "INVALID_ARGUMENT", "messages"),
        (pb.GenerateRequest(prompt=pb.Prompt(text="a"), request_id="i" * 129), "INVALID_ARGUMENT", "request_id"),
        (pb.GenerateRequest(prompt=pb.Prompt(text="a"), model="other"), "NOT_FOUND", "model"),
        (pb.GenerateRequest(prompt=pb.Prompt(text="a"), model="ü" * 50_000), "NOT_FOUND", "model"),
    ],
)
def test_bad_requests_name_the_field(toy: Path, request_: pb.GenerateRequest, code: str, param: str) -> None:
    async def main() -> None:
        async with running(toy) as r:
            error = await r.refusal(r.api.Generate(request_))
            assert error.code().name == code, error
            assert param in error.details()
            assert dict(error.trailing_metadata())["jaxserve-param"] == param
            assert "".join(m.text for m in await r.generate(text_request(max_tokens=2))) == "de", "others are untouched"
            if param == "prompt" and request_.params.max_tokens or len(request_.prompt.text) > 1000:
                assert "This model's maximum context length is" in error.details()

    asyncio.run(main())


def test_no_chat_template(toy: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    async def main() -> None:
        async with running(tmp_path) as r:
            chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])
            error = await r.refusal(r.api.Generate(pb.GenerateRequest(prompt=pb.Prompt(chat=chat))))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "template" in error.details()

    asyncio.run(main())


def test_errors_of_the_engine(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            r.engine.refuse = Overloaded("the queue is full")
            r.engine.refuse.retry_after_s = 3
            error = await r.refusal(r.api.Generate(text_request()))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "3000"

            r.engine.refuse = DeadlineExceeded("too late")
            assert (await r.refusal(r.api.Generate(text_request()))).code() is grpc.StatusCode.DEADLINE_EXCEEDED

            r.engine.refuse = None
            r.engine.fail_after = (2, EngineStopped("the engine went away"))
            call = r.api.Generate(text_request())
            got = []
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for message in call:
                    got.append(message.text)
            error = caught.value
            assert got == ["d", "e"]
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert error.details() == "the engine went away"

            r.engine.fail_after = None
            r.engine.state = EngineState.LOADING
            for call in (
                r.api.Generate(text_request()),
                r.api.Score(score_request()),
                r.api.ListModels(pb.ListModelsRequest()),
            ):
                assert (await r.refusal(call)).code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_a_bug_is_not_shown_to_the_client(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running(toy) as r:
            r.engine.fail_after = (1, RuntimeError("secret"))
            error = await r.refusal(r.api.Generate(text_request()))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in error.details()
            assert "secret" in caplog.text

    asyncio.run(main())


def test_a_message_over_the_limit(toy: Path) -> None:
    async def main() -> None:
        async with running(toy, max_message_bytes=4096) as r:
            error = await r.refusal(r.api.Generate(text_request("x" * 5000)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert not r.engine.requests
            assert await r.generate(text_request("x" * 100))

    asyncio.run(main())
