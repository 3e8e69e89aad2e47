"""Captured values of offline jobs: every token once beside the output, killed anywhere, and what is refused."""

import asyncio
import contextlib
import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from batch_jobs import DyingDisk, Killed, child, text_row, write
from batch_running import Capturing, install, write_rows
from fake_engine import ids_of

import jaxserve
from jaxserve import LLM, SamplingParams, cli
from jaxserve.batch_job import captures, store
from jaxserve.batch_job.captures import Captures, folder_of
from jaxserve.batch_job.files import find
from jaxserve.batch_job.rows import Row
from jaxserve.batch_job.store import Store
from jaxserve.client.host import Outbox
from jaxserve.errors import BatchStopped, ConfigError, EngineStopped
from jaxserve.request import TapInfo
from jaxserve.text import TextDelta

pyarrow = pytest.importorskip("pyarrow", reason="captured values are Arrow files, which need pyarrow")
import pyarrow.compute  # noqa: E402, F811
import pyarrow.ipc  # noqa: E402, F811

CAPTURE = "--capture=pair"


@pytest.fixture
def engine():
    return Capturing()


@pytest.fixture
def batch(tmp_path, counter, engine, monkeypatch):
    """`jaxserve batch in.jsonl out.jsonl --capture` in tmp_path; its exit code."""
    install(monkeypatch.setattr, engine)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *flags: cli.call(["batch", "in.jsonl", "out.jsonl", str(counter), CAPTURE, *flags])


def files(out: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder_of(out))): p.read_bytes() for p in sorted(folder_of(out).rglob("*")) if p.is_file()
    }


def table(out: Path):
    return pyarrow.concat_tables(
        pyarrow.ipc.open_file(p.read_bytes()).read_all() for p in sorted(folder_of(out).glob("rows-*.arrow"))
    )


def expected(name: str, row: int, prompt: str, length: int, index: int = 0, choice: int = 0) -> list[dict]:
    """What the counting model has captured of a prompt and `length` tokens of answer."""
    ids = ids_of(prompt)
    tokens = [*ids, *(ids[-1] + 1 + choice + i for i in range(length))]
    return [
        {"row": row, "custom_id": name, "prompt": index, "choice": choice, "position": i, "token_id": token,
         "generated": i >= len(ids), "pair": [token, i], "half": token / 2}
        for i, token in enumerate(tokens[:-1])
    ]  # fmt: skip


# --- what is in the files --------------------------------------------------------------------------------------------


def test_a_row_for_every_token_that_the_model_has_read(batch, tmp_path, capsys) -> None:
    rows = [text_row("a", n=2), "{", text_row("b", ["xy", "uvw"], max_tokens=2), text_row("c", "z", max_tokens=1)]
    write(tmp_path / "in.jsonl", *rows)
    assert batch() == 3
    assert "without prefix cache, one decode step a launch" in capsys.readouterr().err
    found = table(tmp_path / "out.jsonl")
    want = [*expected("a", 0, "ab", 3), *expected("a", 0, "ab", 3, choice=1), *expected("b", 2, "xy", 2)]
    want += [*expected("b", 2, "uvw", 2, index=1), *expected("c", 3, "z", 1)]
    assert found.to_pylist() == want
    assert found.schema.field("pair").type == pyarrow.list_(pyarrow.float32(), 2)
    assert found.schema.field("half").type == pyarrow.float32(), "bfloat16, which Arrow does not have"
    assert list(files(tmp_path / "out.jsonl")) == ["rows-000000000-000000003.arrow"]
    assert not (folder_of(tmp_path / "out.jsonl") / "pieces").exists()


def test_long_sequences_are_written_in_batches_and_rows_in_several_files(batch, tmp_path, monkeypatch) -> None:
    write(tmp_path / "in.jsonl", *(text_row(f"r{i}", "abcdef", max_tokens=4) for i in range(7)))
    monkeypatch.setattr(captures, "BATCH_TOKENS", 4)
    monkeypatch.setattr(captures, "FILE_ROWS", 3)
    assert batch() == 0
    assert table(tmp_path / "out.jsonl").to_pylist() == [
        entry for i in range(7) for entry in expected(f"r{i}", i, "abcdef", 4)
    ]
    assert list(files(tmp_path / "out.jsonl")) == [
        f"rows-{first:09d}-{last:09d}.arrow" for first, last in ((0, 2), (3, 5), (6, 6))
    ]
    with pyarrow.ipc.open_file(files(tmp_path / "out.jsonl")["rows-000000006-000000006.arrow"]) as file:
        assert [file.get_batch(i).num_rows for i in range(file.num_record_batches)] == [4, 4, 1]
    whole = files(tmp_path / "out.jsonl")
    monkeypatch.setattr(captures, "FILE_ROWS", 4096)
    monkeypatch.setattr(captures, "FILE_BYTES", 1)
    assert batch("--overwrite") == 0, "the same job, complete: it is not run again"
    assert files(tmp_path / "out.jsonl") == whole
    assert batch("--overwrite", "--seed=2") == 0
    assert len(files(tmp_path / "out.jsonl")) == 7
    assert len(find(f"{tmp_path}/**/*.arrow", "x.jsonl")) == 7
    with pytest.raises(ConfigError, match="is the output"):
        find(f"{tmp_path}/**/*.arrow", str(tmp_path / "out.jsonl"))


def test_a_row_whose_engine_dies_is_captured_anew(batch, engine, tmp_path, monkeypatch) -> None:
    write(tmp_path / "in.jsonl", *(text_row(f"r{i}", "abcdef", max_tokens=9, n=2) for i in range(4)))
    monkeypatch.setattr(captures, "BATCH_TOKENS", 2)
    died, deltas = [], engine.generate

    async def dying(request):
        count = 0
        async for delta in deltas(request):
            yield delta
            count += 1
            if count == 7 and request.id not in died and not request.id.startswith("3"):
                died.append(request.id)
                raise EngineStopped("died")

    monkeypatch.setattr(engine, "generate", dying)
    assert batch() == 0
    assert len(died) == 3
    assert table(tmp_path / "out.jsonl").to_pylist() == [
        entry for i in range(4) for k in range(2) for entry in expected(f"r{i}", i, "abcdef", 9, choice=k)
    ]


# --- killed and run again --------------------------------------------------------------------------------------------


def test_sigkill_at_random_moments_gives_the_same_files(tmp_path, counter) -> None:
    source = write_rows(tmp_path / "in.jsonl", 300)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    process = child(str(source), str(whole), str(counter), CAPTURE)
    process.communicate()
    assert process.returncode == 3
    times, kills, code = random.Random(5), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        kill_s = times.uniform(0.03, 0.3) if kills < 3 else 0
        process = child(str(source), str(killed), str(counter), CAPTURE, kill_s=kill_s)
        process.communicate()
        code = process.returncode
        kills += code == -signal.SIGKILL
    assert code == 3 and kills >= 2
    assert killed.read_bytes() == whole.read_bytes()
    assert files(killed) == files(whole)
    assert len(files(whole)) == 5
    bodies = [json.loads(line) if line != "{" else None for line in source.read_text().splitlines()]
    assert table(killed).to_pylist() == [
        entry
        for i, row in enumerate(bodies)
        if row is not None
        for entry in expected(row["custom_id"], i, row["body"]["prompt"], row["body"]["max_tokens"])
    ]


TAPS = (TapInfo("x", (1,), "float32"),)


def work(path: Path, disk, monkeypatch) -> bool:
    """Brings 12 rows of 5 tokens, every fifth one failed, into a store and its captures; whether it came to the end."""
    with monkeypatch.context() as patch:
        for module in (captures, store):
            patch.setattr(module, "os", disk)
        patch.setattr(captures, "FILE_ROWS", 4)
        patch.setattr(captures, "BATCH_TOKENS", 2)
        try:
            with contextlib.closing(Store(path)) as found:
                if found.head is None:
                    found.begin({"job": "one"})
                else:
                    found.resume()
                values = Captures(folder_of(path), TAPS)
                values.begin(found)
                for number in (1, 0, 3, 2, 7, 5, 4, 6, 11, 10, 9, 8):
                    if number in found:
                        continue
                    recording = values.record(Row(number=number, line=1, place="", custom_id=f"{number}"), [[1, 2, 3]])
                    for first, end, token in ((0, 2, ()), (2, 3, (4,)), (3, 4, (5,)), (4, 5, (6,))):
                        data = np.arange(first, end, dtype=np.float32) + 10 * number
                        delta = TextDelta(index=0, text="", token_ids=token, logprobs=None, captured=(data.tobytes(),))
                        recording.add(0, delta)
                    if number % 5 == 3:
                        recording.drop()
                    else:
                        values.answered(number, recording.finish())
                    found.add(number, b"{}", failed=number % 5 == 3, tokens=3)
                    while values.due(found.rows):
                        found.sync()
                        values.write()
                while values.due(found.rows, last=True):
                    values.write()
                values.finish()
                found.finish()
            return True
        except Killed:
            return False


def test_whatever_the_disk_was_doing_when_the_process_died(tmp_path, monkeypatch) -> None:
    (tmp_path / "whole").mkdir()
    assert work(tmp_path / "whole" / "out.jsonl", DyingDisk(10**6), monkeypatch)
    whole = files(tmp_path / "whole" / "out.jsonl")
    assert list(whole) == [f"rows-{a:09d}-{a + 3:09d}.arrow" for a in (0, 4, 8)]
    assert table(tmp_path / "whole" / "out.jsonl").column("x").to_pylist() == [
        [10.0 * number + i] for number in range(12) if number % 5 != 3 for i in range(5)
    ]
    for at in range(1, 1000):
        path = tmp_path / str(at) / "out.jsonl"
        path.parent.mkdir()
        if work(path, DyingDisk(at), monkeypatch):
            break
        tries = 0
        while not work(path, DyingDisk(at + 5 * tries), monkeypatch):
            tries += 1
        assert files(path) == whole
    assert at > 60


# --- which job it is, and what is refused ----------------------------------------------------------------------------


@pytest.fixture
def half(batch, engine, tmp_path, monkeypatch) -> Path:
    """A job whose first row is done, whose second one is bad, and whose third one is not done."""
    out, deltas = tmp_path / "out.jsonl", engine.generate

    async def stopping(request):
        while request.id.startswith("2-"):
            await asyncio.sleep(0.01)
            if out.read_bytes().count(b"\n") == 2:
                raise BatchStopped("enough")
        async for delta in deltas(request):
            yield delta

    write(tmp_path / "in.jsonl", text_row("a"), "{", text_row("c"))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "generate", stopping)
        assert batch() == 1
    return out


def test_a_resume_captures_the_same(batch, half, counter, engine, capsys, monkeypatch) -> None:
    plain = ["batch", "in.jsonl", "out.jsonl", str(counter)]
    for flags, now in ((["--capture=pair", "--capture=half"], "pair, half"), ([], "nothing")):
        assert cli.call([*plain, *flags]) == 2
        assert f"belongs to another job: capture was pair, is {now}. Give another OUT" in capsys.readouterr().err
    assert batch() == 3
    assert table(half).column("custom_id").unique().to_pylist() == ["a", "c"]


@pytest.mark.parametrize("change", ["removed", "a piece", "more"])
def test_values_that_somebody_changed_are_refused(change, batch, half, capsys) -> None:
    (piece,) = (folder_of(half) / "pieces").iterdir()
    if change == "removed":
        piece.unlink()
        (folder_of(half) / "pieces").rmdir()
        folder_of(half).rmdir()
    elif change == "a piece":
        piece.unlink()
    else:
        (folder_of(half) / "rows-000000000-000000000.arrow").write_bytes(b"ARROW1")
    assert batch() == 2
    assert "out.jsonl.capture was changed or removed after this job wrote it" in capsys.readouterr().err
    assert batch("--overwrite", "--seed=1") == 3
    assert table(half).num_rows == 2 * 4


def test_a_folder_that_is_no_jobs_is_left_alone(batch, half, tmp_path, capsys) -> None:
    for path in (half, tmp_path / "out.jsonl.job"):
        path.unlink()
    before = files(half)
    assert batch() == 2
    assert "out.jsonl.capture is there already and no unfinished job's" in capsys.readouterr().err
    assert files(half) == before
    assert batch("--overwrite") == 3
    assert table(half).num_rows == 2 * 4


def test_a_full_disk_ends_the_job_and_not_the_row(batch, half, tmp_path, monkeypatch, capsys) -> None:
    def full(*args):
        raise OSError(28, "No space left on device")

    for batch_tokens in (1, 1024):  # in the midst of a row, and at its end
        with monkeypatch.context() as patch:
            patch.setattr(captures, "BATCH_TOKENS", batch_tokens)
            patch.setattr(captures._Sequence, "_write", full)
            assert batch() == 1
        assert "out.jsonl.capture: No space left on device. The rows that are done are safe" in capsys.readouterr().err
    assert batch() == 3
    assert table(half).num_rows == 2 * 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["batch", "in.jsonl", "out.jsonl", "--capture=x", "--engine=ray"], "--capture is served with --engine local"),
        (["batch", "in.jsonl", "memory://out.jsonl", "--capture=x"], "capture writes beside the output"),
        (["serve", "--capture=x"], "Unknown option: --capture=x"),
        (["batch", "in.jsonl", "out.jsonl", "--capture="], "capture must be names of values"),
    ],
)
def test_where_it_cannot_be_had(argv, message, batch, tmp_path, capsys) -> None:
    write(tmp_path / "in.jsonl", text_row("a"))
    assert cli.call(argv) != 0
    said = capsys.readouterr()
    assert message in said.err + said.out


def test_pyarrow_is_asked_for_before_the_model_is_loaded(batch, tmp_path, monkeypatch, capsys) -> None:
    write(tmp_path / "in.jsonl", text_row("a"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert batch() == 2
    assert "capture writes Arrow files, which need pyarrow: pip install" in capsys.readouterr().err


# --- with a real engine ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_of_the_embedded_model(tmp_path) -> None:
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128, "num_kv_pages": 64}
    options = small | {"warmup": "lazy", "capture": ["layers.3.mlp", "hidden"]}
    prompts = ["Once upon a time", "The sky is", "x " * 40]
    source = write(tmp_path / "in.txt", *prompts)
    with pytest.raises(ConfigError, match=r"capture 'layers.7.mlp': llama has no such value; it has embed, "):
        jaxserve.run_batch(source, tmp_path / "out.jsonl", raw=True, **options | {"capture": "layers.7.mlp"})
    sampling = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
    done = jaxserve.run_batch(source, tmp_path / "out.jsonl", raw=True, sampling=sampling, **options)
    assert done.complete and not done.failed
    found = table(tmp_path / "out.jsonl")
    with LLM(**options) as llm:
        outputs = llm.generate(prompts, SamplingParams(**sampling))
        two = llm.generate([5, 9, 100], SamplingParams(max_tokens=3, n=2, ignore_eos=True)).outputs
        assert [len(part.captured["hidden"]) for part in two] == [5, 5]
        np.testing.assert_array_equal(two[0].captured["hidden"][:3], two[1].captured["hidden"][:3])
        stopped = llm.generate("Once upon a", SamplingParams(temperature=0, max_tokens=30, stop=("e",)))
        (part,) = stopped.outputs
        assert part.stop_reason == "e"
        assert len(part.captured["hidden"]) == len(stopped.prompt_token_ids) + len(part.token_ids) - 1
    for i, output in enumerate(outputs):
        here = found.filter(pyarrow.compute.equal(found.column("row"), i))
        (part,) = output.outputs
        assert here.column("token_id").to_pylist() == [*output.prompt_token_ids, *part.token_ids[:-1]]
        assert here.column("generated").to_pylist().count(True) == 4
        for name, values in part.captured.items():
            flat = here.column(name).combine_chunks().flatten().to_numpy()
            np.testing.assert_array_equal(flat.reshape(values.shape), values)


def test_an_engine_waits_for_a_front_end_that_does_not_read() -> None:
    async def run() -> None:
        outbox, sent = Outbox(asyncio.get_running_loop(), most=10), []

        async def write(message: bytes) -> None:
            sent.append(message)

        producer = asyncio.create_task(asyncio.to_thread(lambda: [outbox.put(b"x" * 6, wait=True) for _ in range(5)]))
        await asyncio.sleep(0.05)
        assert not producer.done()
        outbox.put(b"status")  # does not wait
        for count in range(1, 7):
            await outbox.send(write)
            assert len(sent) == count
        await producer
        await outbox.empty()
        assert sorted(sent) == [b"status", *[b"x" * 6] * 5]

    asyncio.run(run())
