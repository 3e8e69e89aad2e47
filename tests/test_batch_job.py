"""Offline jobs: every row once and the same bytes, killed anywhere; bad rows, other jobs, full disks, all formats."""

import asyncio
import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import http_harness
import pytest
from batch_running import Counter, install, write_rows
from fake_engine import FakeEngine, write_tokenizer

from jaxserve import cli
from jaxserve.batch_job import BatchOptions, in_one_engine, job, rows, run_job, store
from jaxserve.batch_job.store import Store
from jaxserve.client import EngineState
from jaxserve.config import EngineOptions
from jaxserve.errors import BatchStopped, ConfigError, EngineStopped
from jaxserve.fingerprint import checkpoint_digest
from jaxserve.text import TextModel

ROOT = Path(__file__).parent.parent
pyarrow = pytest.importorskip("pyarrow", reason="tables need pyarrow, which is in the extra `batch`")
import pyarrow.ipc  # noqa: E402, F811
import pyarrow.parquet  # noqa: E402


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("JAXSERVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model") / "counter")


@pytest.fixture
def engine() -> FakeEngine:
    return Counter()


@pytest.fixture
def batch(tmp_path, counter, engine, monkeypatch) -> Callable[..., int]:
    """`jaxserve batch IN OUT` in tmp_path, with the counting engine; its exit code."""
    install(monkeypatch.setattr, engine)
    monkeypatch.chdir(tmp_path)
    return lambda source, out, *flags: cli.call(["batch", str(source), str(out), str(counter), *flags])


def chat_row(name: str, content: str = "ab", **body: Any) -> dict:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 3} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def text_row(name: str, prompt: Any = "ab", **body: Any) -> dict:
    body = {"prompt": prompt, "max_tokens": 3} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def write(path: Path, *lines: dict | str | bytes) -> Path:
    raw = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what a row becomes ----------------------------------------------------------------------------------------------


def test_rows_get_the_servers_answers_in_openais_record(batch, tmp_path, engine) -> None:
    write(tmp_path / "in.jsonl", chat_row("a"), text_row("b", n=2), text_row("c", ["ab", "xy"]))
    assert batch("in.jsonl", "out.jsonl") == 0
    chat, two, pair = read(tmp_path / "out.jsonl")
    assert [r["custom_id"] for r in (chat, two, pair)] == ["a", "b", "c"]
    assert set(chat) == {"id", "custom_id", "response", "error"}
    assert chat["error"] is None
    assert chat["id"].startswith("batch_req_")
    assert chat["response"]["status_code"] == 200
    body = chat["response"]["body"]
    assert (body["object"], body["model"], body["created"]) == ("chat.completion", "counter", 0)
    assert body["id"] == f"chatcmpl-{chat['response']['request_id']}"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["usage"]["completion_tokens"] == 3
    assert [c["text"] for c in two["response"]["body"]["choices"]] == ["cde", "def"]
    assert [c["text"] for c in pair["response"]["body"]["choices"]] == ["cde", "z{|"]
    assert len({r["id"] for r in (chat, two, pair)}) == 3


def test_a_body_is_answered_as_over_http(batch, tmp_path) -> None:
    bodies = [
        text_row("a", logprobs=2, echo=True, return_token_ids=True),
        chat_row("b", logprobs=True, top_logprobs=2, n=2),
        chat_row("c", max_tokens=None, stop="z"),
        chat_row("d", tools=[{"type": "function"}]),
        chat_row("e", temperature=7e9),
        text_row("f", "x" * 600),
        text_row("g", model="gpt-4"),
        text_row("h", ""),
    ]
    write(tmp_path / "in.jsonl", *bodies)
    batch("in.jsonl", "out.jsonl", "--served-model-name", "fake")
    for row, record in zip(bodies, read(tmp_path / "out.jsonl"), strict=True):
        answer = asyncio.run(http_harness.call(FakeEngine(), "POST", row["url"], row["body"]))
        body = answer.json()
        assert record["response"]["status_code"] == answer.status_code
        for answer in (body, record["response"]["body"]):
            for name in ("id", "created"):
                answer.pop(name, None)
            answer.get("usage", {}).pop("prompt_tokens_details", None)
        assert record["response"]["body"] == body


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a line of OpenAI's batch format"),
        (b"\xff{}", "line 2: not JSON"),
        (b'{"custom_id": 7, "body": ' + b"\xff" * 3 + b"}", "line 2: not "),
        (b"[" * 100_000, "line 2: n"),
        ({"custom_id": "x", "url": "/v1/completions"}, "missing required field `body`"),
        (text_row("x") | {"custom_id": 7}, "line 2: not a line"),
        (text_row("x") | {"method": "GET"}, "method 'GET' is not served"),
        (text_row("x") | {"url": "/v1/images"}, "url '/v1/images' is not served in a batch; served are"),
        (text_row("first"), "custom_id 'first' was used before, in line 1"),
        (text_row("x", ""), "the prompt is empty"),
        (text_row("x", "y" * 600), "maximum context length is 512 tokens"),
        (text_row("x", top_p=3), "top_p must be in (0, 1]"),
        (text_row("x", guided_regex="a"), "`guided_regex` is not supported"),
        (text_row("x", stream=True), "stream is not served in a batch"),
        (text_row("x", timeout=3), "timeout is not served in a batch"),
        (chat_row("x", messages=[]), "messages is empty"),
    ],
)
def test_a_bad_row_is_a_record_that_says_where_and_why(line, message, batch, tmp_path, capsys) -> None:
    write(tmp_path / "in.jsonl", text_row("first"), line, text_row("last"))
    assert batch("in.jsonl", "out.jsonl") == 3
    first, bad, last = read(tmp_path / "out.jsonl")
    assert first["error"] is last["error"] is None
    assert message in bad["error"]["message"]
    assert bad["error"]["message"].startswith("line 2: ")
    assert bad["error"]["line"] == 2
    assert "3 rows, 1 of them with an error" in capsys.readouterr().err


def test_a_line_that_cannot_be_held_is_passed_over(batch, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 400)
    write(tmp_path / "in.jsonl", text_row("a"), text_row("b", "x" * 5000), text_row("c"))
    assert batch("in.jsonl", "out.jsonl") == 3
    found = read(tmp_path / "out.jsonl")
    assert [r["custom_id"] for r in found] == ["a", None, "c"]
    assert "longer than 400 bytes" in found[1]["error"]["message"]


def test_flags_are_for_rows_that_do_not_say(batch, tmp_path) -> None:
    write(
        tmp_path / "in.jsonl",
        {**text_row("a"), "body": {"prompt": "ab"}},
        text_row("b"),
        chat_row("c", max_tokens=None, max_completion_tokens=2),
    )
    assert batch("in.jsonl", "out.jsonl", "--max-tokens", "5", "--temperature", "0") == 0
    counts = [r["response"]["body"]["usage"]["completion_tokens"] for r in read(tmp_path / "out.jsonl")]
    assert counts == [5, 3, 2]


def test_seeds_come_from_the_row_and_the_jobs_seed(batch, tmp_path, counter, monkeypatch) -> None:
    seen: list[int | None] = []

    class Watching(FakeEngine):
        async def generate(self, request):
            seen.append(request.params.seed)
            async for delta in super().generate(request):
                yield delta

    install(monkeypatch.setattr, Watching())
    write(tmp_path / "in.jsonl", text_row("a"), text_row("b"), text_row("c", seed=5), text_row("d", ["ab", "cd"]))
    batch("in.jsonl", "one.jsonl")
    one = sorted(seen)
    seen.clear()
    batch("in.jsonl", "two.jsonl")
    assert one == sorted(seen)
    assert len(set(one)) == 5
    assert 5 in one
    seen.clear()
    batch("in.jsonl", "three.jsonl", "--seed", "1")
    assert set(one) & set(seen) == {5}
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_a_template_sees_the_day_on_which_the_job_began(tmp_path, counter, monkeypatch) -> None:
    model = write_tokenizer(tmp_path / "dated")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%Y') }}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    write(tmp_path / "in.jsonl", chat_row("a"))
    out = tmp_path / "out.jsonl"
    install(monkeypatch.setattr, Counter())
    argv = ["batch", str(tmp_path / "in.jsonl"), str(out), str(model)]
    assert cli.call(argv) == 0
    whole = out.read_bytes()
    # As if it had begun in 1999 and been killed before its first row.
    head = Store(out)
    began = head.head | {"started": "1999-12-31T23:59:59"}
    head.begin(began)
    head.close()
    assert cli.call(argv) == 0
    (record,) = read(out)
    assert record["response"]["body"]["choices"][0]["message"]["content"] == ":;<"  # what follows the 9 of 1999
    assert out.read_bytes() != whole


# --- killed and run again --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: nothing that catches exceptions may go on writing."""


class DyingDisk:
    """`os` for store.py, which ends the process at the `at`th operation on the disk, half of a write being done."""

    def __init__(self, at: int):
        self.left = at

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("pwrite", "fsync", "replace", "ftruncate", "unlink"):
            return real

        def operation(*args: Any) -> Any:
            self.left -= 1
            if self.left == 0 and name == "pwrite":
                real(args[0], args[1][: len(args[1]) // 2], args[2])
            if self.left <= 0:
                raise Killed
            return None if name == "fsync" else real(*args)

        return operation


def put(path: Path, disk: Any, results: list[bytes], order: list[int], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Brings the results that are lacking into the store; whether it came to the end."""
    with monkeypatch.context() as patch:
        patch.setattr(store, "os", disk)
        patch.setattr(store, "JOURNAL_BYTES", 400)
        try:
            with contextlib.closing(Store(path)) as found:
                if found.head is None:
                    found.begin({"job": "one"})
                else:
                    found.resume()
                for number in order:
                    if number not in found:
                        found.add(number, results[number], failed=number % 3 == 0, tokens=number)
                        if number % 4 == 0:
                            found.sync()
                found.finish()
                assert (found.failed, found.tokens) == (10, sum(range(30)))
            return True
        except Killed:
            return False


def test_whatever_the_disk_was_doing_when_the_process_died(tmp_path, monkeypatch) -> None:
    results = [json.dumps({"row": i, "text": "x" * (7 * i % 50)}).encode() for i in range(30)]
    expected = b"".join(r + b"\n" for r in results)
    points = 0
    for at in range(1, 1000):
        path = tmp_path / str(at) / "out.jsonl"
        path.parent.mkdir()
        order = random.Random(at).sample(range(30), 30)
        if put(path, DyingDisk(at), results, order, monkeypatch):
            break
        # It dies again and again, each time somewhat later.
        tries = 0
        while not put(path, DyingDisk(at + 7 * tries), results, order, monkeypatch):
            tries += 1
        assert path.read_bytes() == expected
        points += 1
    assert points > 80
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.jsonl", "out.jsonl.job"]


def test_when_the_machine_dies_what_was_not_synced_may_be_anything(tmp_path, monkeypatch) -> None:
    results = [b"%d" % i * 9 for i in range(30)]
    order = [*range(12), *random.Random(0).sample(range(12, 30), 18)]
    path = tmp_path / "out.jsonl"
    assert not put(path, DyingDisk(55), results, order, monkeypatch)
    journal = tmp_path / "out.jsonl.job"
    data = journal.read_bytes()
    mark = next(json.loads(line[14:]) for line in data.splitlines() if line[9:14] == b"mark ")
    assert mark["size"] > 100
    safe = data.index(b"\n", data.index(b" mark ")) + 1
    assert safe < len(data) - 50
    for cut in range(safe, len(data), 11):
        for rest in (b"", bytes(len(data) - cut), b"junk\n" * 9):
            journal.write_bytes(data[:cut] + rest)
            path.write_bytes(path.read_bytes()[: mark["size"]] + bytes(cut % 50))
            assert put(path, os, results, order, monkeypatch)
            assert path.read_bytes() == b"".join(r + b"\n" for r in results)


def child(*argv: str, kill_s: float = 0.0, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "batch_running.py"), str(kill_s), "batch", *argv]
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ, **options)


def test_sigkill_at_random_moments_and_the_same_command_again(tmp_path, counter) -> None:
    source = write_rows(tmp_path / "in.jsonl", 600)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    process = child(str(source), str(whole), str(counter))
    process.communicate()
    assert process.returncode == 3
    times, kills, code = random.Random(3), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        process = child(str(source), str(killed), str(counter), kill_s=times.uniform(0.005, 0.15) if kills < 6 else 0)
        process.communicate()
        code = process.returncode
        kills += code == -signal.SIGKILL
    assert code == 3
    assert kills >= 3
    assert killed.read_bytes() == whole.read_bytes()
    assert len(read(whole)) == 600


@pytest.mark.slow
def test_the_embedded_model_samples_the_same_after_a_kill(tmp_path) -> None:
    prompts = [text_row(f"r{i}", f"Question {i}: what", max_tokens=12, temperature=1.0, n=1 + i % 2) for i in range(60)]
    source = write(tmp_path / "in.jsonl", *prompts)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    flags = ["--warmup", "lazy", "--max-num-batched-tokens", "64"]

    def start(out: str, seqs: int) -> subprocess.Popen[str]:
        argv = ["batch", str(source), str(tmp_path / out), *flags, "--max-num-seqs", str(seqs)]
        command = [sys.executable, "-m", "jaxserve", *argv]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)

    whole = start("whole.jsonl", 4)
    assert whole.communicate()[1].endswith("complete: 60 rows\n")
    for rows_before in (5, 30):
        killed = start("killed.jsonl", 4)
        path = tmp_path / "killed.jsonl.job"
        while killed.poll() is None and not (path.exists() and path.read_bytes().count(b" row ") > rows_before):
            asyncio.run(asyncio.sleep(0.005))
        killed.kill()
        killed.communicate()
    again = start("killed.jsonl", 8)  # on CPU a row's bits are the same in every batch
    assert "going on after" in again.communicate()[1]
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len({r["response"]["body"]["choices"][0]["text"] for r in read(tmp_path / "whole.jsonl")}) > 30


# --- which job it is -------------------------------------------------------------------------------------------------


@pytest.fixture
def half(batch, tmp_path, monkeypatch) -> Path:
    """A job of which one row is done, and whose second one is bad."""
    write(tmp_path / "in.jsonl", text_row("a"), "{", text_row("c"))
    assert batch("in.jsonl", "out.jsonl", "--max-errors", "0") == 1
    return tmp_path / "out.jsonl"


def test_a_complete_job_is_not_run_again(batch, tmp_path, engine, capsys) -> None:
    write(tmp_path / "in.jsonl", text_row("a"))
    assert batch("in.jsonl", "out.jsonl") == 0
    engine.refuse = EngineStopped("nobody may ask")
    assert batch("in.jsonl", "out.jsonl", "--overwrite") == 0
    assert "complete: 1 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--max-tokens", "9"], "max_tokens was not there, is 9"),
        (["--block-size", "8"], "block_size was None, is 8"),
        (["--seed", "3"], "seed was 0, is 3"),
        (["--served-model-name", "x"], "model name was counter, is x"),
        ("input", "input was "),
        ("checkpoint", "checkpoint was "),
        ("code", "code was jaxserve"),
        ("engine", "engine's max_model_len was 512, is 256"),
    ],
)
def test_another_jobs_output_is_refused_with_what_differs(
    change, message, batch, half, tmp_path, counter, monkeypatch, capsys
) -> None:
    flags = change if isinstance(change, list) else []
    before = half.read_bytes()
    if change == "input":
        write(tmp_path / "in.jsonl", text_row("a"), "{", text_row("d"))
    elif change == "checkpoint":
        monkeypatch.setattr("jaxserve.batch_job.identity.checkpoint_digest", lambda path: "another")
    elif change == "code":
        monkeypatch.setattr("jaxserve.fingerprint.__version__", "9")
    elif change == "engine":
        install(monkeypatch.setattr, Counter(max_model_len=256))
    assert batch("in.jsonl", "out.jsonl", *flags) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count(" was ") == 1
    assert "--overwrite" in shown
    assert half.read_bytes() == before
    assert batch("in.jsonl", "out.jsonl", *flags, "--overwrite") == 3
    assert len(read(half)) == 3


def test_what_changes_no_answer_may_change(batch, half, tmp_path) -> None:
    (tmp_path / "in.jsonl").rename(tmp_path / "moved.jsonl")
    assert batch("moved.jsonl", "out.jsonl", "--max-num-seqs", "3", "--warmup", "lazy", "--num-kv-pages", "77") == 3


def test_a_file_that_is_no_jobs_is_refused(batch, tmp_path, capsys) -> None:
    write(tmp_path / "in.jsonl", text_row("a"))
    write(tmp_path / "out.jsonl", "mine")
    assert batch("in.jsonl", "out.jsonl") == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    assert not (tmp_path / "out.jsonl.job").exists()
    assert batch("in.jsonl", "out.jsonl", "--overwrite") == 0
    assert read(tmp_path / "out.jsonl")[0]["custom_id"] == "a"


@pytest.mark.parametrize(
    "change", [lambda p: p.unlink(), lambda p: p.write_text("x"), lambda p: p.write_bytes(p.read_bytes() + b"x")]
)
def test_an_output_that_somebody_changed_is_refused(change, batch, tmp_path, capsys) -> None:
    write(tmp_path / "in.jsonl", text_row("a"))
    batch("in.jsonl", "out.jsonl")
    whole = (tmp_path / "out.jsonl").read_bytes()
    change(tmp_path / "out.jsonl")
    assert batch("in.jsonl", "out.jsonl") == 2
    assert "was changed or removed" in capsys.readouterr().err
    assert batch("in.jsonl", "out.jsonl", "--overwrite") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_one_process_at_a_time(batch, half, capsys) -> None:
    with contextlib.closing(Store(half)):
        assert batch("in.jsonl", "out.jsonl") == 2
    assert "another process is at work on" in capsys.readouterr().err
    assert batch("in.jsonl", "out.jsonl") == 3


def test_a_journal_that_is_none_is_left_alone(batch, tmp_path, capsys) -> None:
    write(tmp_path / "in.jsonl", text_row("a"))
    write(tmp_path / "out.jsonl.job", "my notes on jobs")
    assert batch("in.jsonl", "out.jsonl", "--overwrite") == 2
    assert "is no journal of a job" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl.job").read_text() == "my notes on jobs\n"


def test_checkpoints_differ_by_what_is_in_them(tmp_path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for path in (a, b):
        path.mkdir()
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_bytes(bytes(100))
        (path / ".cache").write_text(path.name)
        (path / "README.md").write_text(path.name)
    assert checkpoint_digest(a) == checkpoint_digest(b)
    (b / "model.safetensors").write_bytes(bytes(99) + b"\1")
    assert checkpoint_digest(a) != checkpoint_digest(b)
    for i in (1, 2):
        (tmp_path / f"m-0000{i}-of-00002.gguf").write_bytes(b"GGUF")
    first = tmp_path / "m-00001-of-00002.gguf"
    before = checkpoint_digest(first)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"GGUE")
    assert checkpoint_digest(first) != before


# --- stopped before the end ------------------------------------------------------------------------------------------


def test_max_errors_stops_and_a_larger_one_goes_on(batch, tmp_path, capsys) -> None:
    write(tmp_path / "in.jsonl", *(["{", text_row("a")] + ["{"] * 5))
    assert batch("in.jsonl", "out.jsonl", "--max-errors", "2") == 1
    shown = capsys.readouterr().err
    assert "3 rows have failed, more than --max-errors 2" in shown
    assert "run the same with a larger --max-errors" in shown
    assert batch("in.jsonl", "out.jsonl", "--max-errors", "2") == 1
    assert batch("in.jsonl", "out.jsonl", "--max-errors", "6") == 3
    assert [r["error"] is None for r in read(tmp_path / "out.jsonl")] == [False, True, *[False] * 5]


@pytest.mark.parametrize("limit", [3_000, 20_000])
def test_a_full_disk_loses_nothing(limit, tmp_path, counter) -> None:
    source = write_rows(tmp_path / "in.jsonl", 60)
    out = tmp_path / "out.jsonl"
    code = f"import sys, resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.argv.pop(0); "
    code += "import batch_running; sys.exit(batch_running.main(sys.argv))"
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    argv = [sys.executable, "-c", code, "0", "batch", str(source), str(out), str(counter)]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "are safe: make room, then run the same again" in done.stderr
    safe = out.with_name("out.jsonl.job").read_bytes().count(b" row ")
    assert safe > 3
    process = child(str(source), str(out), str(counter))
    assert f"going on after {safe} rows" in process.communicate()[1]
    assert [r["custom_id"] for r in read(out)] == [f"id-{i}" for i in range(60)]


def test_after_a_failed_fsync_nothing_is_written(tmp_path, monkeypatch) -> None:
    with contextlib.closing(Store(tmp_path / "out.jsonl")) as found:
        found.begin({})
        found.add(0, b"0", failed=False, tokens=0)

        def fsync(fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(store.os, "fsync", fsync)
        with pytest.raises(BatchStopped, match="Input/output error"):
            found.sync()
        with pytest.raises(BatchStopped):
            found.add(1, b"1", failed=False, tokens=0)


def test_ctrl_c_finishes_what_is_in_flight_and_a_second_one_does_not(tmp_path, counter) -> None:
    source = write_rows(tmp_path / "in.jsonl", 90)
    code = (
        "import asyncio, sys, batch_running\n"
        "class Slow(batch_running.Counter):\n"
        "    async def generate(self, request):\n"
        "        print('row', file=sys.stderr, flush=True)\n"
        "        await asyncio.sleep(0.5 if sys.argv[1] == 'once' else 60)\n"
        "        async for delta in super().generate(request):\n"
        "            yield delta\n"
        "batch_running.Counter = lambda jitter: Slow()\n"
        "sys.exit(batch_running.main(['0', *sys.argv[2:]]))"
    )
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    out = tmp_path / "out.jsonl"
    for mode in ("twice", "once"):
        argv = [sys.executable, "-c", code, mode, "batch", str(source), str(out), str(counter)]
        process = subprocess.Popen(argv, env=environ, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for _ in range(16):
            assert process.stderr.readline() == "row\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "finishing 16 rows in flight; once more stops at once\n"
        if mode == "twice":
            process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[1]
        assert process.returncode == 130
        assert "run the same command again to go on" in rest
    assert "stopped after 16 rows" in rest
    process = child(str(source), str(out), str(counter))
    assert "going on after 16 rows" in process.communicate()[1]
    assert [r["custom_id"] for r in read(out) if r["custom_id"]] == [f"id-{i}" for i in range(90)]


def answered(tmp_path: Path, model: TextModel, count: int = 20) -> list[dict]:
    source = write(tmp_path / "in.jsonl", *(text_row(f"r{i}") for i in range(count)))
    options = BatchOptions(input=str(source), output=str(tmp_path / "out.jsonl"))

    @contextlib.asynccontextmanager
    async def opened():
        yield model

    result = asyncio.run(run_job(options, EngineOptions(), source, "counter", in_one_engine(opened)))
    assert result.complete
    return read(tmp_path / "out.jsonl")


class Mortal(Counter):
    """Dies at each of the given requests, and is there again a moment later."""

    def __init__(self, deaths: set[int]):
        super().__init__()
        self.deaths, self.count = deaths, 0

    async def generate(self, request):
        self.count += 1
        if self.count in self.deaths:
            self.state = EngineState.DEAD
            asyncio.get_running_loop().call_later(0.15, self.revive)
        async for delta in super().generate(request):
            yield delta

    def revive(self) -> None:
        self.state = EngineState.READY


def test_rows_are_sent_again_when_the_engine_dies(tmp_path, counter) -> None:
    whole = answered(tmp_path, TextModel.open(counter, Counter(), "counter"))
    (tmp_path / "again").mkdir()
    engine = Mortal({3, 12, 25})
    assert answered(tmp_path / "again", TextModel.open(counter, engine, "counter")) == whole
    assert engine.count > 25


def test_an_engine_that_dies_over_and_over_ends_the_job(tmp_path, counter, monkeypatch) -> None:
    with pytest.raises(BatchStopped, match="died 3 times and finished no row in between"):
        answered(tmp_path, TextModel.open(counter, Mortal(set(range(1000))), "counter"))
    monkeypatch.setattr(job, "DEAD_S", 0.1)
    engine = Mortal({4})
    engine.revive = lambda: None
    with pytest.raises(BatchStopped, match="run the same again"):
        answered(tmp_path, TextModel.open(counter, engine, "counter"))


# --- how much is held, and in which order ----------------------------------------------------------------------------


def test_a_slow_row_holds_up_the_file_and_not_the_others(tmp_path, counter, monkeypatch) -> None:
    monkeypatch.setattr(job, "WINDOW", 40)
    monkeypatch.setattr(job, "CHUNK_ROWS", 8)
    seen: list[int] = []
    read_ahead = []

    class FirstIsSlow(Counter):
        async def generate(self, request):
            number = int(request.id.split("-")[0])
            seen.append(number)
            if number == 0:
                while len(seen) < 40:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.05)
                read_ahead.append(max(seen))
            async for delta in super().generate(request):
                yield delta

    found = answered(tmp_path, TextModel.open(counter, FirstIsSlow(), "counter"), 100)
    assert [r["custom_id"] for r in found] == [f"r{i}" for i in range(100)]
    assert read_ahead == [39]


def test_rows_that_begin_alike_are_sent_one_after_another(batch, tmp_path, counter, monkeypatch) -> None:
    order: list[tuple[int, ...]] = []

    class Watching(Counter):
        async def generate(self, request):
            order.append(request.prompt_token_ids)
            async for delta in super().generate(request):
                yield delta

    install(monkeypatch.setattr, Watching())
    write(tmp_path / "in.jsonl", *(text_row(f"r{i}", f"document {i % 3}, question {i}") for i in range(30)))
    assert batch("in.jsonl", "out.jsonl") == 0
    assert order == sorted(order)
    assert [r["custom_id"] for r in read(tmp_path / "out.jsonl")] == [f"r{i}" for i in range(30)]


def test_memory_does_not_grow_with_the_rows() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_batch.py"), "--rows", "12000"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    held = [float(line.split()[2]) for line in done.stdout.splitlines() if " MiB  " in line]
    assert len(held) > 5
    assert held[-1] - held[1] < 8, done.stdout


# --- formats and places ----------------------------------------------------------------------------------------------


def test_lines_of_text(batch, tmp_path) -> None:
    (tmp_path / "in.txt").write_bytes(b"ab\r\n\n  \ncd\n\xff\nxy")
    assert batch("in.txt", "out.jsonl", "--raw", "--max-tokens", "2") == 3
    found = read(tmp_path / "out.jsonl")
    assert [r["custom_id"] for r in found] == ["line-1", "line-4", "line-5", "line-6"]
    assert found[0]["response"]["body"]["choices"][0]["text"] == "cd"
    assert found[2]["error"]["message"].startswith("line 5: not UTF-8 at byte 0")
    assert batch("in.txt", "chat.jsonl", "--max-tokens", "2") == 3
    assert read(tmp_path / "chat.jsonl")[0]["response"]["body"]["object"] == "chat.completion"


def test_a_glob_is_one_job_and_its_own_output_no_part_of_it(batch, tmp_path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", text_row(name), "{")
    for _ in range(2):
        assert batch("*.jsonl", "all.jsonl") == 3
    found = read(tmp_path / "all.jsonl")
    assert [r["custom_id"] for r in found] == ["a", None, "b", None]
    assert [r["error"]["message"].split(":")[0] for r in found if r["error"]] == ["a.jsonl line 2", "b.jsonl line 2"]
    assert batch("all.jsonl", "all.jsonl") == 2


MESSAGES = [[{"role": "user", "content": "ab"}], [{"role": "system", "content": "x", "name": "n"}], None]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_keep_their_columns_and_gain_the_answers(suffix, batch, tmp_path) -> None:
    table = pyarrow.table({"topic": ["p", "q", None], "messages": MESSAGES, "number": [1, 2, 3]})
    save(table, tmp_path / f"in.{suffix}")
    assert batch(f"in.{suffix}", f"out.{suffix}", "--max-tokens", "2") == 3
    found = load(tmp_path / f"out.{suffix}")
    assert found.select(["topic", "messages", "number"]).equals(table)
    assert found.column("answer").to_pylist() == ["\x0b\x0c", "\x0b\x0c", None]
    assert found.column("completion_tokens").to_pylist() == [2, 2, None]
    assert found.column("finish_reason").to_pylist() == ["length", "length", None]
    assert found.column("error").to_pylist() == [None, None, "row 3: the prompt is null"]
    assert json.loads(found.column("response").to_pylist()[0])["object"] == "chat.completion"
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"in.{suffix}", f"out.{suffix}", f"out.{suffix}.rows.job"]
    first = (tmp_path / f"out.{suffix}").read_bytes()
    assert batch(f"in.{suffix}", f"out.{suffix}", "--max-tokens", "2") == 3  # complete: nothing is done
    assert (tmp_path / f"out.{suffix}").read_bytes() == first
    (tmp_path / f"out.{suffix}").unlink()
    assert batch(f"in.{suffix}", f"out.{suffix}", "--max-tokens", "2") == 2
    assert batch(f"in.{suffix}", f"out.{suffix}", "--max-tokens", "2", "--overwrite") == 3
    assert (tmp_path / f"out.{suffix}").read_bytes() == first


def save(table: Any, path: Path) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


def load(path: Path) -> Any:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path)
    with pyarrow.ipc.open_file(path) as file:
        return file.read_all()


def test_prompts_of_a_column_with_ids_to_lines_and_lines_to_a_table(batch, tmp_path) -> None:
    save(pyarrow.table({"custom_id": ["x", "y"], "text": ["ab", ""]}), tmp_path / "in.parquet")
    assert batch("in.parquet", "out.jsonl", "--column", "text", "--raw") == 3
    assert [r["custom_id"] for r in read(tmp_path / "out.jsonl")] == ["x", "y"]
    write(tmp_path / "in.jsonl", text_row("a"), "{")
    assert batch("in.jsonl", "out.parquet") == 3
    assert load(tmp_path / "out.parquet").select(["custom_id", "answer"]).to_pydict() == {
        "custom_id": ["a", None],
        "answer": ["cde", None],
    }


@pytest.mark.parametrize(
    ("columns", "flags", "message"),
    [
        ({"question": ["a"]}, [], "no column 'messages or prompt'; the columns are question: name one with --column"),
        ({"prompt": [1]}, [], "column 'prompt' holds int64"),
        ({"prompt": ["a"], "answer": ["b"]}, [], "has a column 'answer', a name of the output's"),
        ({"prompt": ["a"]}, ["--column", "text"], "no column 'text'"),
    ],
)
def test_wrong_columns_are_said_before_the_model_is_loaded(columns, flags, message, batch, tmp_path, capsys) -> None:
    save(pyarrow.table(columns), tmp_path / "in.parquet")
    assert batch("in.parquet", "out.parquet", *flags) == 2
    assert message in capsys.readouterr().err


def test_remote_files(batch, tmp_path, monkeypatch, capsys) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "store", {})
    memory.pipe("/in/one.jsonl", json.dumps(text_row("a")).encode() + b"\n")
    assert batch("memory://in/*.jsonl", "memory://out.jsonl") == 0
    assert json.loads(memory.cat("/out.jsonl"))["custom_id"] == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl.rows.job"]
    assert batch("memory://in/*.jsonl", "memory://out.jsonl") == 0
    memory.rm("/out.jsonl")
    assert batch("memory://in/*.jsonl", "memory://out.jsonl") == 2
    save(pyarrow.table({"prompt": ["ab", "cd"]}), tmp_path / "in.parquet")
    assert batch(f"file://{tmp_path}/in.parquet", "memory://out.parquet", "--raw") == 0
    found = pyarrow.parquet.read_table(pyarrow.BufferReader(memory.cat("/out.parquet")))
    assert found.column("prompt").to_pylist() == ["ab", "cd"]
    assert batch(f"file://{tmp_path}/in.parquet", "memory://x/out.parquet", "--raw", "--work-dir", "nowhere") == 2
    assert "no such directory: nowhere" in capsys.readouterr().err


def test_an_upload_that_fails_is_made_up_for(batch, tmp_path, monkeypatch, capsys) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "store", {})
    write(tmp_path / "in.jsonl", text_row("a"))
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("quota exceeded")

        patch.setattr(type(memory), "put_file", refuse)
        assert batch("in.jsonl", "memory://out.jsonl") == 1
    assert "quota exceeded. All rows are safe in out.jsonl.rows" in capsys.readouterr().err
    assert batch("in.jsonl", "memory://out.jsonl") == 0
    assert json.loads(memory.cat("/out.jsonl"))["custom_id"] == "a"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.jsonl", "out.jsonl"], "cannot open none.jsonl: no such file"),
        (["in.jsonl", "out.txt"], "the output must end in .jsonl, .parquet or .arrow"),
        (["in.jsonl", "no/out.jsonl"], "no such directory: no"),
        (["packed.jsonl.gz", "out.jsonl"], "is compressed; unpack it first"),
        (["gs://bucket/in.jsonl", "out.jsonl"], "gs:// needs one package more: pip install gcsfs"),
        (["s3://bucket/in.jsonl", "out.jsonl"], "s3:// needs one package more: pip install s3fs"),
        (["nope://in.jsonl", "out.jsonl"], "nope"),
        (["in.*", "out.jsonl"], "files of several kinds"),
        (["broken.parquet", "out.jsonl"], "is no parquet file"),
        (["in.jsonl", "out.jsonl", "--max-errors", "-1"], "--max-errors"),
    ],
)
def test_what_the_user_can_cure_is_one_line_and_code_2(argv, message, batch, tmp_path, capsys) -> None:
    write(tmp_path / "in.jsonl", text_row("a"))
    for name in ("in.txt", "packed.jsonl.gz", "broken.parquet"):
        (tmp_path / name).write_bytes(b"x")
    assert batch(*argv) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("jaxserve: ")


def test_lines_need_no_pyarrow_and_no_fsspec(batch, tmp_path, monkeypatch, capsys) -> None:
    for name in ("pyarrow", "fsspec"):
        monkeypatch.setitem(sys.modules, name, None)
    write(tmp_path / "in.jsonl", text_row("a"))
    assert batch("in.jsonl", "out.jsonl") == 0
    assert batch("in.jsonl", "out.parquet") == 2
    assert "need pyarrow: pip install 'jaxserve[offline]'" in capsys.readouterr().err
    assert batch("memory://in.jsonl", "out2.jsonl") == 2
    assert "needs fsspec: pip install 'jaxserve[offline]'" in capsys.readouterr().err
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"pyarrow", "fsspec"} <= {d.split(">")[0] for d in extras["offline"]}


def test_from_python(tmp_path) -> None:
    import jaxserve

    with pytest.raises(ConfigError, match="sampling has no 'max_token'"):
        jaxserve.run_batch("in.jsonl", "out.jsonl", sampling={"max_token": 1})
    with pytest.raises(ConfigError, match="there is no option 'blocksize'"):
        jaxserve.run_batch("in.jsonl", "out.jsonl", blocksize=1)
    with pytest.raises(ConfigError, match=r"cannot open .*: no such file"):
        jaxserve.run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="a job that can be resumed reads a file, not standard input"):
        jaxserve.run_batch("-", tmp_path / "out.jsonl")
