"""gRPC Embed, by its shapes and refusals, and by a real model through a server."""

import asyncio
import re
from pathlib import Path

import grpc
import numpy as np
import pytest
from fake_engine import VOCAB_SIZE, embeds, vector, write_tokenizer
from grpc_running import ids, running, score_request, text_request, until
from running_server import Server

from jaxserve.errors import Overloaded
from jaxserve.server.proto import jaxserve_v1_pb2 as pb
from jaxserve.server.proto import jaxserve_v1_pb2_grpc as pb_grpc

GOLDENS = Path(__file__).parent / "goldens" / "embeddings"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("toy"))


def texts(*found: str, **fields) -> pb.EmbedRequest:
    return pb.EmbedRequest(prompts=[pb.Prompt(text=text) for text in found], **fields)


def test_texts_and_token_ids(toy: Path) -> None:
    async def main() -> None:
        async with running(toy, embeds()) as r:
            request = texts("abc", "de", priority=4, cache_salt="salt", request_id="mine")
            request.prompts.add(token_ids=ids("xyz"))
            call = r.api.Embed(request)
            answer = await call
            assert (answer.request_id, answer.model) == ("mine", "toy")
            assert [list(e.values) for e in answer.embeddings] == [vector("abc"), vector("de"), vector("xyz")]
            assert [e.usage for e in answer.embeddings] == [pb.Usage(prompt_tokens=n) for n in (3, 2, 3)]
            assert dict(await call.trailing_metadata())["jaxserve-weights-version"] == "0"
            for seen in r.engine.requests:
                assert (seen.priority, seen.cache_salt, seen.embed) == (4, "salt", True)
                assert seen.id.startswith("mine-")

    asyncio.run(main())


def test_prompts_are_cut_only_where_that_is_asked_for(toy: Path) -> None:
    async def main() -> None:
        async with running(toy, embeds(max_model_len=5)) as r:
            for longest, want in ((3, "abc"), (-1, "abcde")):
                answer = await r.api.Embed(texts("abcdefghi", truncate_prompt_tokens=longest))
                assert list(answer.embeddings[0].values) == vector(want)
            refused = await r.refusal(r.api.Embed(texts("ab", "abcdefghi")))
            assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert len(r.engine.requests) == 2, "nothing runs of a request that is refused"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        (pb.EmbedRequest(), "prompts", "prompts is missing"),
        (pb.EmbedRequest(prompts=[pb.Prompt()]), "prompts", r"prompts\[0\] is missing: give text or token_ids"),
        (
            pb.EmbedRequest(prompts=[pb.Prompt(text="a"), pb.Prompt(chat=pb.Chat())]),
            "prompts",
            r"prompts\[1\] is a chat, which is not embedded",
        ),
        (texts("a", ""), "prompts", "the text is empty"),
        (pb.EmbedRequest(prompts=[pb.Prompt(token_ids=pb.TokenIds())]), "prompts", "is empty"),
        (
            pb.EmbedRequest(prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=[VOCAB_SIZE]))]),
            r"prompts[0]",
            rf"prompts\[0\] holds {VOCAB_SIZE}, which is out of range",
        ),
        (texts(*["a"] * 2049), "prompts", "2049 texts, at most 2048"),
        (texts("a" * 513), "prompts", "maximum context length is 512 tokens"),
        (texts("a", dimensions=2), "dimensions", "not said to keep their meaning when cut"),
        (texts("a", dimensions=0), "dimensions", r"must be in \[1, 4\], got 0"),
        (texts("a", truncate_prompt_tokens=0), "truncate_prompt_tokens", r"must be -1 or in \[1, 512\], got 0"),
        (texts("a", request_id="x" * 129), "request_id", "longer than 128"),
    ],
)
def test_bad_requests(toy: Path, request_: pb.EmbedRequest, param: str, message: str) -> None:
    async def main() -> None:
        async with running(toy, embeds()) as r:
            refused = await r.refusal(r.api.Embed(request_))
            assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert re.search(message, refused.details()), refused.details()
            assert dict(refused.trailing_metadata())["jaxserve-param"] == param
            assert not r.engine.requests

    asyncio.run(main())


def test_each_model_says_what_it_is_for(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            refused = await r.refusal(r.api.Embed(texts("a")))
            assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT and "--task embed" in refused.details()
        async with running(toy, embeds()) as r:
            for call in (r.api.Generate(text_request()), r.api.Score(score_request())):
                refused = await r.refusal(call)
                assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT and "Embed" in refused.details()
            other = await r.refusal(r.api.Embed(texts("a", model="other")))
            assert other.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


def test_an_error_of_the_engine_ends_the_whole_call(toy: Path) -> None:
    async def main() -> None:
        engine = embeds()
        engine.refuse = Overloaded("too many")
        async with running(toy, engine) as r:
            refused = await r.refusal(r.api.Embed(texts("a", "b")))
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await until(lambda: not engine.running)

    asyncio.run(main())


def test_a_real_model() -> None:
    want = np.load(GOLDENS / "bert" / "golden.npz")
    with (
        Server("--max-num-seqs", "4", "--warmup", "lazy", model=GOLDENS / "bert") as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        answer = pb_grpc.JaxserveStub(channel).Embed(texts(*want["texts"].tolist()), timeout=60)
    np.testing.assert_allclose([list(e.values) for e in answer.embeddings], want["mean"], atol=2e-6)
