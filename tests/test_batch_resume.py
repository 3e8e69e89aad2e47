"""Offline jobs that do not run through: killed anywhere, stopped, out of disk, or begun as another job."""

import asyncio
import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import DyingDisk, Killed, answered, child, read, text_row, write
from batch_running import Counter, install, write_rows
from fake_engine import FakeEngine

from jaxserve.batch_job import job, store
from jaxserve.batch_job.store import Store
from jaxserve.client import EngineState
from jaxserve.errors import BatchStopped, EngineStopped
from jaxserve.fingerprint import checkpoint_digest
from jaxserve.text import TextModel

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("no_variables")


@pytest.fixture
def engine() -> FakeEngine:
    return Counter()


# --- killed and run again --------------------------------------------------------------------------------------------


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
