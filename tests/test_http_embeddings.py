"""/v1/embeddings and /v1/score over HTTP and in offline jobs: shapes, OpenAI's own client, bodies that are wrong."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from batch_running import Counter, install
from fake_engine import EMBEDDING, FIRST_BYTE, FakeEngine, embeds, vector, write_tokenizer
from http_harness import application, call, http_client, in_loop, live, until
from running_server import Server

from jaxserve import cli

GOLDENS = Path(__file__).parent / "goldens" / "embeddings"


async def ask(engine: FakeEngine, path: str = "/v1/embeddings", **body: Any) -> dict[str, Any]:
    answer = await call(engine, "POST", path, {"model": "fake"} | body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@in_loop
async def test_one_text() -> None:
    assert await ask(embeds(), input="abc") == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector("abc")}],
        "model": "fake",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


@pytest.mark.parametrize(
    "given",
    [
        ["abc", "de"],
        [[FIRST_BYTE + ord(c) for c in "abc"], [FIRST_BYTE + ord(c) for c in "de"]],
    ],
    ids=["texts", "ids"],
)
@in_loop
async def test_several(given: list[Any]) -> None:
    found = await ask(embeds(), input=given)
    assert [(d["index"], d["embedding"]) for d in found["data"]] == [(0, vector("abc")), (1, vector("de"))]
    assert found["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


@in_loop
async def test_token_ids_of_one_text() -> None:
    found = await ask(embeds(), input=[FIRST_BYTE + ord(c) for c in "xyz"])
    assert [d["embedding"] for d in found["data"]] == [vector("xyz")]


@in_loop
async def test_base64_is_little_endian_float32() -> None:
    found = await ask(embeds(), input="abc", encoding_format="base64")
    raw = base64.b64decode(found["data"][0]["embedding"])
    assert np.frombuffer(raw, "<f4").tolist() == vector("abc")


@in_loop
async def test_openai_client() -> None:
    engine = embeds()
    async with live(engine) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        answer = await client.embeddings.create(model="fake", input=["abc", "de"])  # in base64, unless asked
        plain = await client.embeddings.create(model="fake", input="abc", encoding_format="float")
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "a"}])
        with pytest.raises(openai.BadRequestError) as empty:
            await client.embeddings.create(model="fake", input="")
    assert [d.embedding for d in answer.data] == [vector("abc"), vector("de")]
    assert plain.data[0].embedding == vector("abc") and answer.usage.total_tokens == 5
    assert "use /v1/embeddings" in refused.value.message
    assert "nothing to embed" in empty.value.message and empty.value.param == "input"


@in_loop
async def test_priority_timeout_and_salt_reach_the_engine() -> None:
    engine = embeds()
    await ask(engine, input="abc", priority=3, timeout=9.5, cache_salt="s", user="me")
    request = engine.requests[0]
    assert (request.priority, request.timeout_s, request.cache_salt, request.embed) == (3, 9.5, "s", True)


@in_loop
async def test_metrics_count_requests_and_their_tokens() -> None:
    async with http_client(application(embeds())) as client:
        assert (await client.post("/v1/embeddings", json={"input": ["abc", "de"]})).status_code == 200
        text = (await client.get("/metrics")).text
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="fake"} 2.0' in text
    assert 'vllm:request_prompt_tokens_sum{engine="0",model_name="fake"} 5.0' in text
    assert 'handler="/v1/embeddings",method="POST",status="200"} 1.0' in text


@in_loop
async def test_truncation() -> None:
    found = await ask(embeds(), input=["abcdef", "ab"], truncate_prompt_tokens=3)
    assert [d["embedding"] for d in found["data"]] == [vector("abc"), vector("ab")]
    found = await ask(embeds(max_model_len=5), input="abcdefghi", truncate_prompt_tokens=-1)
    assert found["data"][0]["embedding"] == vector("abcde")


BAD = [
    ({}, "input", "`input` is required"),
    ({"input": ""}, "input", "the text is empty"),
    ({"input": []}, "input", "the input is empty"),
    ({"input": ["a", ""]}, "input", "the text is empty"),
    ({"input": [[]]}, "input", "is empty"),
    ({"input": ["a", 1]}, "input", "mixes texts, token ids"),
    ({"input": [99999]}, "input", "token id 99999 is out of range"),
    ({"input": 3}, "input", "expected"),
    ({"input": ["a"] * 2049}, "input", "2049 texts, at most 2048 are served in one request"),
    ({"input": "a" * 513}, "input", "maximum context length is 512 tokens. However, the input has 513 tokens"),
    ({"input": "a", "encoding_format": "bytes"}, "encoding_format", "one of 'float', 'base64', got 'bytes'"),
    ({"input": "a", "dimensions": 2}, "dimensions", "have 4 dimensions and are not said to keep their meaning"),
    ({"input": "a", "dimensions": 0}, "dimensions", r"dimensions must be in \[1, 4\], got 0"),
    ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", r"must be -1 or in \[1, 512\], got 0"),
    ({"input": "a", "timeout": -1}, "timeout", "timeout must be a number of seconds above 0"),
    ({"input": "a", "priority": 2**40}, "priority", "priority must fit in 32 bits"),
    ({"input": "a", "prompt_embeds": "x"}, "prompt_embeds", "not supported"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD, ids=[str(b)[:40] for b, _, _ in BAD])
@in_loop
async def test_bad_bodies(body: dict[str, Any], param: str, message: str) -> None:
    import re

    engine = embeds()
    answer = await call(engine, "POST", "/v1/embeddings", json.dumps(body).encode())
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error
    assert re.search(message, error["message"]), error
    assert not engine.requests, "nothing runs of a request that is refused"


@in_loop
async def test_a_model_that_generates_says_how_to_get_embeddings() -> None:
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/v1/score", {"text_1": "a", "text_2": "b"})):
        answer = await call(FakeEngine(), "POST", path, body)
        assert answer.status_code == 400 and "--task embed" in answer.json()["error"]["message"]


@in_loop
async def test_an_error_of_the_engine_is_the_answer() -> None:
    from jaxserve.errors import Overloaded

    engine = embeds()
    engine.refuse = Overloaded("too many")
    answer = await call(engine, "POST", "/v1/embeddings", {"input": ["a", "b"]})
    assert answer.status_code == 503 and "retry-after" in answer.headers
    await until(lambda: not engine.running)


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@in_loop
async def test_scores_are_cosines(path: str) -> None:
    def cosine(a: str, b: str) -> float:
        x, y = np.array(vector(a)), np.array(vector(b))
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    found = await ask(embeds(), path, text_1="abc", text_2=["abc", "zz"])
    assert found["id"].startswith("score-") and found["object"] == "list"
    assert [(d["index"], d["object"]) for d in found["data"]] == [(0, "score"), (1, "score")]
    assert [d["score"] for d in found["data"]] == pytest.approx([1.0, cosine("abc", "zz")], abs=1e-6)
    assert found["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    found = await ask(embeds(), path, text_1=["abc", "q"], text_2=["zz", "abc"])
    assert [d["score"] for d in found["data"]] == pytest.approx([cosine("abc", "zz"), cosine("q", "abc")], abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"text_1": "a"}, "text_2", "`text_2` is required"),
        ({"text_1": "a", "text_2": []}, "text_2", "text_2 is empty"),
        ({"text_1": "a", "text_2": ["b", ""]}, "text_2", "the text is empty"),
        ({"text_1": ["a", "b"], "text_2": "c"}, "text_1", "text_1 has 2 texts and text_2 1: give one text_1 for all"),
        ({"text_1": "a" * 600, "text_2": "c"}, "text_1", "the input has 600 tokens"),
        ({"text_1": "c", "text_2": "a" * 600}, "text_2", "the input has 600 tokens"),
    ],
)
@in_loop
async def test_bad_scores(body: dict[str, Any], param: str, message: str) -> None:
    answer = await call(embeds(), "POST", "/v1/score", body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"], error


def run_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], name: str = "in.jsonl") -> list[Any]:
    model = write_tokenizer(tmp_path / "fake")
    install(monkeypatch.setattr, Counter(embedding=EMBEDDING))
    source, out = tmp_path / name, tmp_path / "out.jsonl"
    source.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    cli.call(["batch", str(source), str(out), str(model)])
    return [json.loads(line) for line in out.read_text().splitlines()]


def row(name: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def test_a_batch_of_embeddings_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_batch(
        tmp_path,
        monkeypatch,
        [
            row("a", "/v1/embeddings", input=["abc", "de"]),
            row("b", "/v1/score", text_1="abc", text_2="abc"),
            row("c", "/v1/embeddings", input=""),
            row("d", "/v1/completions", prompt="abc"),
        ],
    )
    bodies = [record["response"]["body"] for record in found]
    assert [record["response"]["status_code"] for record in found] == [200, 200, 400, 400]
    assert [d["embedding"] for d in bodies[0]["data"]] == [vector("abc"), vector("de")]
    assert bodies[1]["created"] == 0 and bodies[1]["data"][0]["score"] == pytest.approx(1.0)
    assert "line 3: the text is empty" in found[2]["error"]["message"]
    assert "use /v1/embeddings" in found[3]["error"]["message"]


def test_bare_lines_are_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_batch(tmp_path, monkeypatch, ["abc", "xyz"], "in.txt")
    assert [record["response"]["body"]["data"][0]["embedding"] for record in found] == [vector("abc"), vector("xyz")]


def test_the_server_as_a_user_runs_it() -> None:
    want = np.load(GOLDENS / "bert" / "golden.npz")
    with Server("--max-num-seqs", "4", "--warmup", "lazy", model=GOLDENS / "bert") as server:
        assert "/v1/embeddings" in server.output
        found = server.post("/v1/embeddings", input=want["texts"].tolist())
        score = server.post("/v1/score", text_1=str(want["texts"][1]), text_2=str(want["texts"][2]))
        metrics = server.client.get("/metrics").text
    vectors = np.array([d["embedding"] for d in found["data"]])
    np.testing.assert_allclose(vectors, want["mean"], atol=2e-6)
    assert score["data"][0]["score"] == pytest.approx(float(want["mean"][1] @ want["mean"][2]), abs=1e-5)
    computed = [line for line in metrics.splitlines() if line.startswith("jaxserve_computed_tokens_total")]
    assert float(computed[0].split()[-1]) > found["usage"]["total_tokens"]
