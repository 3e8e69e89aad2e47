"""The whole server as a user meets it: front end, engine process, real models."""

import asyncio
import json
import os
import signal
import subprocess
import threading

import httpx
import numpy as np
import openai
import pytest
from running_server import Server

# One set of sizes for all tests, so that they share the compile cache; so few pages that a crowd is preempted.
SMALL = ("--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--num-kv-pages", "24", "--max-model-len", "320")


@pytest.fixture(scope="module")
def server():
    with Server(*SMALL, "--warmup", "full") as running:
        yield running


def test_the_embedded_model_answers(server):
    assert "Paris" in server.ask("What is the capital of France?")
    assert "12" in server.ask("What is 7 plus 5?")
    assert json.loads(server.ask("What is the capital of France? Answer as JSON."))["answer"] == "Paris"


@pytest.mark.parametrize("name", ["stories260K", "babyllama361"])
def test_goldens_through_completions(shared_data, name):
    """Every greedy id, and every log-probability within 1e-3, of transformers in float32."""
    path = shared_data / "models" / name
    golden = json.loads((path / "golden.json").read_text())
    with Server("--max-num-seqs", "8", model=path) as running:
        for case in golden["cases"]:
            got = running.complete(case["prompt"], max_tokens=64, temperature=0, logprobs=5, ignore_eos=True)
            assert got["prompt_token_ids"] == case["prompt_ids"]
            assert got["token_ids"] == case["greedy_ids"]
            assert np.abs(np.subtract(got["logprobs"]["token_logprobs"], case["greedy_logprobs"])).max() < 1e-3
            echo = running.complete(case["prompt_ids"], max_tokens=0, echo=True, logprobs=1)
            want = case["prompt_logprobs"]
            if len(case["prompt_ids"]) > 1:
                assert echo["logprobs"]["token_logprobs"][0] is None
                assert np.abs(np.subtract(echo["logprobs"]["token_logprobs"][1:], want)).max() < 1e-3
        if name == "stories260K":
            published = (path / "llama2c_expected_stdout.txt").read_text().rstrip("\n")
            text = running.complete("", max_tokens=200, temperature=0)["text"]
            assert text[: len(published)] == published and len(published) > 400


def test_a_crowd_is_everyone_alone(server):
    """64 streams at once: lengths, temperatures, seeds, shared prefixes; each gets what it gets alone."""
    rng = np.random.default_rng(7)
    questions = ["What is the capital of France?", "Tell me a short story about a dog.", "What is 3 plus 4?"]
    bodies = [
        dict(
            prompt=[*([5] * 20 if i % 2 else []), *rng.integers(10, 1000, int(rng.integers(1, 60))).tolist()],
            max_tokens=int(rng.integers(1, 60)), temperature=float(rng.choice([0.0, 0.8, 1.3])),
            seed=int(rng.integers(0, 2**31)), ignore_eos=bool(i % 3), presence_penalty=float(rng.choice([0.0, 0.5])),
        )
        if i % 8
        else dict(prompt=questions[i % 3], max_tokens=40, temperature=0.0)
        for i in range(64)
    ]  # fmt: skip

    async def stream(client: httpx.AsyncClient, body: dict) -> list[int]:
        tokens = []
        async with client.stream(
            "POST", "/v1/completions", json=body | {"stream": True, "return_token_ids": True}
        ) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
        return tokens

    async def crowd() -> list[list[int]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=httpx.Limits()) as client:
            return await asyncio.gather(*(stream(client, body) for body in bodies))

    together = asyncio.run(crowd())
    assert server.metric("vllm:num_preemptions_total") > 0, "the pool was to be too small"
    assert server.metric("vllm:prefix_cache_hits_total") > 0
    for body, tokens in zip(bodies, together, strict=True):
        assert server.complete(**body)["token_ids"] == tokens
    for phase, some in (("serving", False), ("warmup", True)):
        made = sum(server.metric(f"jaxserve_xla_{how}_total", phase=phase) for how in ("compiles", "loads"))
        assert (made > 0) == some
    assert server.metric("vllm:kv_cache_usage_perc") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_pages(server, stream):
    before = server.metric("vllm:request_success_total")
    body = dict(prompt=[7], max_tokens=310, ignore_eos=True, stream=stream, n=4, seed=1)
    with httpx.Client(base_url=server.url, timeout=120) as client, pytest.raises(httpx.ReadTimeout):
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
                raise httpx.ReadTimeout("enough")
        client.post("/v1/completions", json=body, timeout=httpx.Timeout(120, read=0.1))
    server.wait_for("idle", lambda: server.metric("vllm:num_requests_running") == 0, 20)
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    server.wait_for("counted", lambda: server.metric("vllm:request_success_total") == before + 1, 20)
    assert server.metric("vllm:request_success_total", finished_reason="abort") >= 1


def test_the_openai_client(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["jaxserve-tiny"]
    messages = [{"role": "user", "content": "What is the capital of Italy?"}]
    kwargs = dict(model="jaxserve-tiny", messages=messages, temperature=0)
    whole = client.chat.completions.create(**kwargs, logprobs=True, top_logprobs=3, n=2)
    assert "Rome" in whole.choices[0].message.content and len(whole.choices) == 2
    text = "".join(t.token for t in whole.choices[0].logprobs.content)
    assert text.startswith(whole.choices[0].message.content)
    chunks = list(client.chat.completions.create(**kwargs, stream=True, stream_options={"include_usage": True}))
    joined = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert joined == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens // 2
    stopped = client.chat.completions.create(**kwargs, stop=["Rome"])
    assert "Rome" not in stopped.choices[0].message.content and stopped.choices[0].finish_reason == "stop"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**kwargs | {"model": "other"})
    with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 320 tokens"):
        client.completions.create(model="jaxserve-tiny", prompt=[1] * 400)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(**kwargs, tools=[{"type": "function", "function": {"name": "f"}}])


def test_grpc_generate_and_health(server):
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from jaxserve.server.proto import jaxserve_v1_pb2 as pb
    from jaxserve.server.proto import jaxserve_v1_pb2_grpc as pb_grpc

    with grpc.insecure_channel(server.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="jaxserve.v1.Jaxserve")
        )
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        stub = pb_grpc.JaxserveStub(channel)
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="What is the capital of France?")])
        params = pb.SamplingParams(temperature=0.0)
        answer = stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(chat=chat), params=params))
        assert "Paris" in "".join(part.text for part in answer)


def test_a_killed_engine_comes_back():
    """Requests in flight are told, health says 503, and the next request is answered."""
    with Server(*SMALL) as server:
        answers = []

        def ask():
            answers.append(
                httpx.post(
                    f"{server.url}/v1/completions",
                    json=dict(prompt=[7], max_tokens=300, ignore_eos=True, n=8),
                    timeout=120,
                )
            )

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        server.wait_for("running", lambda: server.metric("vllm:num_requests_running") > 0)
        first = server.engine_pid()
        os.kill(first, signal.SIGKILL)
        server.wait_for("noticed", lambda: server.client.get("/health").status_code == 503)
        for thread in threads:
            thread.join()
        assert [a.status_code for a in answers] == [503] * 4
        assert all(a.json()["error"]["message"] and "retry-after" in a.headers for a in answers)
        assert server.client.get("/livez").status_code == 200, "the front end lives"
        server.wait_for("restarted", lambda: server.client.get("/health").status_code == 200, 120)
        assert server.engine_pid() != first
        assert "Paris" in server.ask("What is the capital of France?")


def test_sigterm_lets_streams_finish_and_a_second_one_does_not():
    body = dict(prompt=[7], max_tokens=300, ignore_eos=True, stream=True)
    for signals in (1, 2):
        with Server(*SMALL) as server:
            with server.client.stream("POST", "/v1/completions", json=body | {"n": 8}) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                assert first.startswith("data: ")
                engine = server.engine_pid()
                server.process.send_signal(signal.SIGTERM)
                # By a client that is there: while another is made on a busy machine, the streams may end.
                server.wait_for("draining", lambda: server.client.get("/health").status_code == 503)
                refused = server.client.post("/v1/completions", json=dict(prompt="x", max_tokens=1))
                assert refused.status_code == 503 and "retry-after" in refused.headers
                if signals == 2:
                    server.process.send_signal(signal.SIGTERM)
                rest = list(lines)
            finished = sum('"finish_reason":"length"' in line for line in rest)
            failed = any('"error"' in line for line in rest)
            assert rest[-2:-1] == ["data: [DONE]"] or rest[-1] == "data: [DONE]"
            assert (finished == 8 and not failed) if signals == 1 else (failed or finished == 8)
            assert server.process.wait(60) == 0
            assert not os.path.exists(f"/proc/{engine}"), "the engine process is gone"


def test_a_full_queue_says_when_to_come_back():
    with Server(*SMALL, "--max-queued-requests", "1") as server:
        body = dict(prompt=[7] * 300, max_tokens=20, ignore_eos=True)  # 20 of 24 pages: one runs, one waits

        async def crowd():
            async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
                return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(8)))

        answers = asyncio.run(crowd())
        codes = [a.status_code for a in answers]
        assert 200 in codes and set(codes) == {200, 503}
        refused = next(a for a in answers if a.status_code == 503)
        assert int(refused.headers["retry-after"]) >= 1 and "waiting" in refused.json()["error"]["message"]
        assert server.complete([7], max_tokens=2)["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["no/such/dir"], "no such directory"),
        (["--max-model-len", "999999"], "exceeds the model's"),
        (["--attention", "flash"], "choose one of auto, reference"),
    ],
)
def test_what_cannot_start_says_why_and_ends(flags, message):
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", "serve", *flags, "--port", "0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
