"""gRPC Score, ListModels, Tokenize and Detokenize, and the files generated from the proto."""

import asyncio
import json
from pathlib import Path

import grpc
import pytest
from fake_engine import EOS, VOCAB_SIZE, FakeEngine, ids_of, write_tokenizer
from grpc_running import ids, running, score_request, until
from tool_files import load_tool

from jaxserve.request import SamplingParams
from jaxserve.server.proto import jaxserve_v1_pb2 as pb

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("prompt", ["text", "token_ids", "chat"])
@pytest.mark.parametrize("continuation", ["text", "token_ids"])
def test_score(toy: Path, prompt: str, continuation: str) -> None:
    async def main() -> None:
        async with running(toy) as r:
            chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="ab")])
            prompts = {
                "text": pb.Prompt(text="ab"),
                "token_ids": pb.Prompt(token_ids=ids("ab")),
                "chat": pb.Prompt(chat=chat),
            }
            answer = await r.api.Score(
                pb.ScoreRequest(
                    prompt=prompts[prompt],
                    continuations=[
                        pb.Continuation(**{continuation: text if continuation == "text" else ids(text)})
                        for text in ("c", "dé")
                    ],
                    top_logprobs=2,
                    cache_salt="salt",
                    priority=4,
                    request_id="mine",
                )
            )
            assert (answer.request_id, answer.model) == ("mine", "toy")
            one, two = answer.scores
            assert [t.token_id for t in one.tokens] == list(ids_of("c"))
            assert [t.token_id for t in two.tokens] == list(ids_of("dé"))
            assert (one.log_likelihood, two.log_likelihood) == (-1.25, -3.75)
            assert not one.is_greedy and not two.is_greedy
            assert [len(t.top) for t in two.tokens] == [2, 2, 2]
            assert two.tokens[0].bytes == b"d"
            seen = {request.prompt_token_ids[-3:]: request for request in r.engine.requests}[ids_of("dé")]
            assert seen.params == SamplingParams(
                max_tokens=0, temperature=0.0, prompt_logprobs=2, prompt_logprobs_from=len(seen.prompt_token_ids) - 3
            )
            assert (seen.cache_salt, seen.priority) == ("salt", 4)
            assert two.usage == pb.Usage(prompt_tokens=len(seen.prompt_token_ids))
            assert len({request.id for request in r.engine.requests}) == 2

    asyncio.run(main())


def test_score_says_what_greedy_decoding_would_write(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fake_engine

    plain = fake_engine._logprobs
    likely = set(ids_of("bc"))
    monkeypatch.setattr(fake_engine, "_logprobs", lambda t, k, rank: plain(t, k, rank=1 if t in likely else rank))

    async def main() -> None:
        async with running(toy) as r:
            request = pb.ScoreRequest(
                prompt=pb.Prompt(text="ab"), continuations=[pb.Continuation(text=t) for t in ("c", "cx")]
            )
            answer = await r.api.Score(request)
            assert [score.is_greedy for score in answer.scores] == [True, False]
            assert [score.log_likelihood for score in answer.scores] == [-0.25, -1.5]

    asyncio.run(main())


def test_score_where_the_tokenizer_joins_prompt_and_continuation(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["bc"] = VOCAB_SIZE
    tokenizer["model"]["merges"] = [["b", "c"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))

    async def main() -> None:
        async with running(tmp_path, FakeEngine(vocab_size=VOCAB_SIZE + 1)) as r:
            request = pb.ScoreRequest(prompt=pb.Prompt(text="ab"), continuations=[pb.Continuation(text="cd")])
            answer = await r.api.Score(request)
            assert [t.token for t in answer.scores[0].tokens] == ["bc", "d"]

            request.prompt.text = "b"
            error = await r.refusal(r.api.Score(request))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "no token precedes continuations[0]" in error.details()

            request.prompt.token_ids.CopyFrom(ids("ab"))
            answer = await r.api.Score(request)
            assert [t.token for t in answer.scores[0].tokens] == ["c", "d"]

    asyncio.run(main())


def test_score_runs_as_many_at_once_as_the_engine_computes(toy: Path) -> None:
    async def main() -> None:
        async with running(toy, FakeEngine(max_num_seqs=3)) as r:
            r.engine.gate = asyncio.Event()
            call = asyncio.ensure_future(r.api.Score(score_request(10)))
            await until(lambda: len(r.engine.running) == 3)
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(r.engine.requests) == 3
            r.engine.gate.set()
            assert len((await call).scores) == 10

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (pb.ScoreRequest(prompt=pb.Prompt(text="a")), "continuations"),
        (pb.ScoreRequest(prompt=pb.Prompt(text="a"), continuations=[pb.Continuation()]), "continuations"),
        (pb.ScoreRequest(prompt=pb.Prompt(text="a"), continuations=[pb.Continuation(text="")]), "continuations"),
        (pb.ScoreRequest(continuations=[pb.Continuation(text="a")]), "prompt"),
        (pb.ScoreRequest(prompt=pb.Prompt(text=""), continuations=[pb.Continuation(text="a")]), "prompt"),
        (
            pb.ScoreRequest(prompt=pb.Prompt(text="a"), continuations=[pb.Continuation(text="a")], top_logprobs=21),
            "top_logprobs",
        ),
        (
            pb.ScoreRequest(
                prompt=pb.Prompt(text="a"), continuations=[pb.Continuation(token_ids=pb.TokenIds(ids=[VOCAB_SIZE]))]
            ),
            "continuations[0]",
        ),
        (pb.ScoreRequest(prompt=pb.Prompt(text="a"), continuations=[pb.Continuation(text="x" * 600)]), "prompt"),
    ],
)
def test_bad_score_requests_name_the_field(toy: Path, request_: pb.ScoreRequest, param: str) -> None:
    async def main() -> None:
        async with running(toy) as r:
            error = await r.refusal(r.api.Score(request_))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert dict(error.trailing_metadata())["jaxserve-param"] == param

    asyncio.run(main())


def test_models_and_tokens(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            (model,) = (await r.api.ListModels(pb.ListModelsRequest())).models
            assert (model.name, model.max_model_len, model.vocab_size) == ("toy", 512, VOCAB_SIZE)

            answer = await r.api.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="né")))
            assert [t.token_id for t in answer.tokens] == list(ids_of("né"))
            assert [t.bytes for t in answer.tokens] == [b"n", b"\xc3", b"\xa9"]
            assert answer.max_model_len == 512

            request = pb.DetokenizeRequest(token_ids=[*ids_of("né"), EOS])
            assert (await r.api.Detokenize(request)).text == "né"
            request.skip_special_tokens = False
            assert (await r.api.Detokenize(request)).text == "né</s>"

            error = await r.refusal(r.api.Detokenize(pb.DetokenizeRequest(token_ids=[VOCAB_SIZE])))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            for call in (
                r.api.Tokenize(pb.TokenizeRequest(model="other")),
                r.api.Detokenize(pb.DetokenizeRequest(model="other")),
                r.api.Score(pb.ScoreRequest(model="other")),
            ):
                assert (await r.refusal(call)).code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


def test_the_generated_files_are_what_the_proto_gives(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    made = load_tool("gen_proto").generate(tmp_path)
    assert made
    for path in made:
        committed = ROOT / path.relative_to(tmp_path)
        assert _unversioned(path) == _unversioned(committed), f"{committed.name} is stale: run tools/gen_proto.py"


def _unversioned(path: Path) -> list[str]:
    """The file's lines without those that only say which release generated it."""
    lines = path.read_text().splitlines()
    return [
        line for line in lines if "Version" not in line and "VERSION" not in line and not line.strip(" ,").isdigit()
    ]
