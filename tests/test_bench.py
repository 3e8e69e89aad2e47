"""The bench: what a load is, what is measured, and the table that scripts read."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, write_tokenizer

from jaxserve import bench
from jaxserve.config import ServerOptions
from jaxserve.errors import ConfigError, EngineStopped
from jaxserve.metrics import EngineMetrics
from jaxserve.server import serve
from jaxserve.text import TextModel


def test_a_workload_is_the_same_for_the_same_seed() -> None:
    work = bench.Workload(input_len=10, output_len=5, num_prompts=50, range_ratio=0.5, vocab_size=100, seed=3)
    samples = work.samples()
    assert samples == work.samples()
    assert samples != bench.Workload(input_len=10, output_len=5, num_prompts=50, range_ratio=0.5, seed=4).samples()
    assert {len(s.prompt_token_ids) for s in samples} == set(range(5, 16))
    assert all(4 <= t < 100 for s in samples for t in s.prompt_token_ids)


@pytest.mark.parametrize("wrong", [{"num_prompts": 0}, {"input_len": 0}, {"range_ratio": 1.0}, {"seed": -1}])
def test_a_wrong_workload_is_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        bench.Workload(**wrong)


def test_requests_at_once_and_what_is_counted() -> None:
    engine = FakeEngine()
    samples = bench.Workload(input_len=7, output_len=3, num_prompts=20).samples()
    report = asyncio.run(bench.measure(bench.engine_target(engine), samples, concurrency=4))
    assert report.peak_concurrent == 4
    assert [o.tokens for o in report.done] == [3] * 20
    assert [len(o.itl_s) for o in report.done] == [2] * 20
    assert all(r.params.ignore_eos for r in engine.requests)


def test_requests_at_a_rate_are_not_held_back() -> None:
    samples = bench.Workload(num_prompts=5, output_len=2).samples()
    report = asyncio.run(bench.measure(bench.engine_target(FakeEngine()), samples, request_rate=1000.0))
    assert len(report.done) == 5


def test_the_table_has_vllms_labels() -> None:
    outcome = bench.Outcome(prompt_tokens=10, tokens=5, ttft_s=0.1, latency_s=0.5, itl_s=[0.1] * 4)
    failed = bench.Outcome(prompt_tokens=10, error="refused")
    table = bench.Report((outcome, outcome, failed), 2.0, 3, 3).table()
    found = dict(line.rsplit(maxsplit=1) for line in table.splitlines() if ":" in line)
    assert found == {
        "Successful requests:": "2",
        "Failed requests:": "1",
        "Maximum request concurrency:": "3",
        "Benchmark duration (s):": "2.00",
        "Total input tokens:": "20",
        "Total generated tokens:": "10",
        "Request throughput (req/s):": "1.00",
        "Output token throughput (tok/s):": "5.00",
        "Peak concurrent requests:": "3",
        "Total token throughput (tok/s):": "15.00",
        "Mean TTFT (ms):": "100.00",
        "Median TTFT (ms):": "100.00",
        "P99 TTFT (ms):": "100.00",
        "Mean TPOT (ms):": "100.00",
        "Median TPOT (ms):": "100.00",
        "P99 TPOT (ms):": "100.00",
        "Mean ITL (ms):": "100.00",
        "Median ITL (ms):": "100.00",
        "P99 ITL (ms):": "100.00",
    }


def test_a_failed_request_is_counted_and_the_others_go_on() -> None:
    engine = FakeEngine()
    engine.fail_after = (0, EngineStopped("gone"))
    samples = bench.Workload(num_prompts=3).samples()
    report = asyncio.run(bench.measure(bench.engine_target(engine), samples))
    assert report.errors() == {"gone": 3}
    assert "Failed requests:                         3" in report.table()


def test_engine_counters_are_read_from_the_metrics() -> None:
    metrics = EngineMetrics("m")
    engine = FakeEngine()

    async def text() -> bytes:
        return metrics.text()

    engine.metrics_text = text
    before = asyncio.run(bench.engine_counters(engine))
    metrics.steps.inc(4)
    metrics.computed_tokens.inc(75)
    metrics.padding_tokens.inc(25)
    for _ in range(4):
        metrics.host_gap.observe(0.0005)
    metrics.program("warmup", 1.0, compiled=True)
    table = asyncio.run(bench.engine_counters(engine)).table(before)
    found = [line.rsplit(maxsplit=1)[-1] for line in table.splitlines()[1:]]
    assert found == ["4", "500.00", "25.00", "0"]


@contextlib.asynccontextmanager
async def http_server(path: Path, engine: FakeEngine) -> AsyncIterator[str]:
    text = TextModel.open(write_tokenizer(path), engine, "counter")
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    options = ServerOptions(port=0, grpc_port=-1, shutdown_timeout=0.1)
    server = asyncio.create_task(serve(options, text, engine, lambda url, grpc: started.set_result(url)))
    try:
        await asyncio.wait((server, started), return_when=asyncio.FIRST_COMPLETED)
        yield started.result()
    finally:
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_a_server_is_measured_over_http(tmp_path, suffix) -> None:
    async def work() -> bench.Report:
        async with http_server(tmp_path, FakeEngine()) as url, bench.HttpTarget(url + suffix) as target:
            assert await target.model() == "counter"
            samples = bench.Workload(input_len=7, output_len=9, num_prompts=12).samples()
            return await bench.measure(target.send, samples, concurrency=3)

    report = asyncio.run(work())
    assert report.errors() == {}
    assert [o.tokens for o in report.done] == [9] * 12


def test_a_servers_errors_are_told(tmp_path) -> None:
    async def work(sample: bench.Sample, model: str | None) -> dict[str, int]:
        async with http_server(tmp_path, FakeEngine()) as url, bench.HttpTarget(url, model) as target:
            return (await bench.measure(target.send, [sample])).errors()

    (error,) = asyncio.run(work(bench.Sample((9999,), 4), None))
    assert "HTTP 400" in error
    (error,) = asyncio.run(work(bench.Sample((5,), 4), "other"))
    assert "HTTP 404" in error


def test_no_server_and_no_url() -> None:
    async def work() -> dict[str, int]:
        async with bench.HttpTarget("127.0.0.1:9", "m") as target:
            return (await bench.measure(target.send, [bench.Sample((5,), 4)])).errors()

    assert len(asyncio.run(work())) == 1
    with pytest.raises(ConfigError, match="base_url"):
        bench.HttpTarget("ftp://somewhere")


def test_bodies_and_events_come_whole_however_they_are_split() -> None:
    stream = b"data: one\r\n\r\n: comment\n\ndata: two\ndata: lines\n\ndata:[DONE]\n\n"

    async def events(size: int) -> list[bytes]:
        async def parts() -> AsyncIterator[bytes]:
            for i in range(0, len(stream), size):
                yield stream[i : i + size]

        return [event async for event in bench._events(parts())]

    for size in range(1, len(stream) + 1):
        assert asyncio.run(events(size)) == [b"one", b"two\nlines", b"[DONE]"]


def test_a_body_that_ends_early_is_an_error() -> None:
    async def work() -> dict[str, int]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nda")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, bench.HttpTarget(f"http://127.0.0.1:{port}", "m") as target:
            return (await bench.measure(target.send, [bench.Sample((5,), 4)])).errors()

    assert len(asyncio.run(work())) == 1


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 "], ids=["silent", "begun"])
def test_a_kept_connection_that_the_server_ends_is_replaced(begun: bytes) -> None:
    """One answer a connection; then it ends it when the next request comes, or in the middle of its answer."""
    event = b'data: {"choices": [{"text": "a"}]}\n\n'
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(event), event)
    asked: list[bytes] = []

    async def work() -> bench.Report:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError):  # the last one is not used again
                for answers in (whole, begun):
                    head = await reader.readuntil(b"\r\n\r\n")
                    asked.append(await reader.readexactly(int(head.split(b"Content-Length: ")[1].split()[0])))
                    writer.write(answers)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, bench.HttpTarget(f"http://127.0.0.1:{port}", "m") as target:
            return await bench.measure(target.send, [bench.Sample((5,), 1)] * 3, concurrency=1)

    report = asyncio.run(work())
    if begun:
        assert list(report.errors().values()) == [1] and len(asked) == 3
    else:
        assert not report.errors() and len(report.done) == 3 and len(asked) == 5
