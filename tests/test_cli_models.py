"""The command line with a real model behind it: the embedded one, in small steps so that little is compiled."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve import cli

SMALL = [
    "--max-num-seqs=2", "--max-num-batched-tokens=32", "--max-model-len=128", "--num-kv-pages=32", "--warmup=lazy",
]  # fmt: skip
GREEDY = ["--temperature=0", "--max-tokens=16"]
QUESTION = "What is the capital of France?"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("JAXSERVE_")]:
        monkeypatch.delenv(name)


def ask(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert cli.call(["run", *argv, *SMALL, *GREEDY]) == 0
    return capsys.readouterr().out.strip()


def test_one_answer_with_its_timing(capsys) -> None:
    assert cli.call(["run", QUESTION, "--verbose", *SMALL, *GREEDY]) == 0
    shown = capsys.readouterr()
    assert "Paris" in shown.out
    assert "eval rate:" in shown.err


def test_a_piped_prompt_and_a_given_one_have_the_same_answer(capsys, monkeypatch, tmp_path) -> None:
    piped = tmp_path / "prompt"
    piped.write_text(QUESTION + "\n")
    with piped.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert ask(capsys) == ask(capsys, "-p", QUESTION)


def test_a_converted_checkpoint_answers_alike(capsys, tmp_path) -> None:
    from jaxserve.hub import resolve_model

    assert cli.call(["convert", str(resolve_model(None)), str(tmp_path / "orbax")]) == 0
    assert ask(capsys, str(tmp_path / "orbax"), QUESTION) == ask(capsys, QUESTION)


def test_a_file_of_prompts(capsys, tmp_path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{{"id": 1, "prompt": "{QUESTION}"}}\nnot json\n{{"id": 3, "messages": []}}\n')
    assert cli.call(["generate", str(source), "-o", str(target), *SMALL, *GREEDY]) == 1
    first, second, _ = [json.loads(line) for line in target.read_text().splitlines()]
    assert first["choices"][0]["text"].strip() == ask(capsys, QUESTION)
    assert "line 2 is not a JSON object" in second["error"]["message"]


def test_bench_prints_the_tables_and_the_ratio(capsys) -> None:
    load = ["--num-prompts=2", "--random-input-len=8", "--random-output-len=4"]
    assert cli.call(["bench", "throughput", "--concurrency", "1", "2", *load, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Successful requests:                     2") == 2
    for label in ("Mean host time a step (us):", "Padding share", "Output tokens/s at 2 over 1 concurrent:"):
        assert label in shown
    assert cli.call(["bench", "throughput", "--concurrency", "64", *load, *SMALL]) == 2
    assert "raise --max-num-seqs" in capsys.readouterr().err
    iterations = ["--num-iters=2", "--num-iters-warmup=0", "--batch-size=2", "--input-len=4", "--output-len=2"]
    assert cli.call(["bench", "latency", *iterations, *SMALL]) == 0
    assert "Avg latency:" in capsys.readouterr().out


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`jaxserve serve` in a process of its own, and what it printed up to and with the curl line."""
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxserve", "serve", "--port=0", "--grpc-port=0", *SMALL],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert process.stdout is not None
    stuck = threading.Timer(240, process.kill)
    stuck.start()
    try:
        printed: list[str] = []
        for line in process.stdout:
            printed.append(line)
            if "curl" in line:
                break
        log.seek(0)
        assert printed and "curl" in printed[-1], log.read()
        yield process, printed
    finally:
        stuck.cancel()
        process.kill()
        process.communicate()
        log.close()


def test_serve_prints_a_request_that_works_and_ends_on_sigterm(server) -> None:
    process, printed = server
    assert printed[0].startswith("jaxserve-tiny is ready")
    command = shlex.split(printed[-1])
    assert command[0] == "curl"
    request = urllib.request.Request(command[1], command[-1].encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        answer = json.loads(response.read())
    assert "Paris" in answer["choices"][0]["message"]["content"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_taken_port_is_told(server) -> None:
    url = next(line.split()[1] for line in server[1] if line.split()[:1] == ["HTTP"])
    argv = [sys.executable, "-m", "jaxserve", "serve", f"--port={url.rsplit(':', 1)[1]}", *SMALL]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("jaxserve: cannot listen on 127.0.0.1:")
    assert "--port" in last


def readme_examples() -> tuple[str, str]:
    """The README's first two Python examples: over HTTP, and in the process."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    http, in_process, *_ = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return http, in_process


def test_the_readmes_python_example(capsys) -> None:
    small = "max_num_seqs=2, max_num_batched_tokens=32, max_model_len=128, num_kv_pages=32, warmup='lazy'"
    example = readme_examples()[1]
    assert "LLM()" in example
    exec(example.replace("LLM()", f"LLM({small})"), {})
    assert "7 plus 5 is 12" in capsys.readouterr().out


def test_the_readmes_openai_example(server, capsys) -> None:
    url = next(line.split()[1] for line in server[1] if line.split()[:1] == ["HTTP"])
    example = readme_examples()[0]
    assert "http://127.0.0.1:8000" in example
    exec(example.replace("http://127.0.0.1:8000", url), {})
    assert "Paris" in capsys.readouterr().out
