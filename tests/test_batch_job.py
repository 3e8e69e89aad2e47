"""Offline jobs: what a row becomes, how many are held, in which order they are sent, and what rows come from."""

import asyncio
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import http_harness
import pytest
from batch_jobs import answered, chat_row, read, text_row, write
from batch_running import Counter, install
from fake_engine import FakeEngine, write_tokenizer

from jaxserve import cli
from jaxserve.batch_job import job, rows
from jaxserve.batch_job.store import Store
from jaxserve.errors import ConfigError
from jaxserve.text import TextModel

ROOT = Path(__file__).parent.parent
pyarrow = pytest.importorskip("pyarrow", reason="tables need pyarrow, which is in the extra `batch`")
import pyarrow.ipc  # noqa: E402, F811
import pyarrow.parquet  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_variables")


@pytest.fixture
def engine() -> FakeEngine:
    return Counter()


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
    assert len(held) == 10
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
