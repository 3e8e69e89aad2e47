"""The GPU benchmark without a GPU: its dry run, what it makes of its figures, and what it refuses."""

import json
import subprocess
import sys

import pytest
from tool_files import TOOLS, load_tool

PROGRAM = TOOLS / "bench_gpu.py"


@pytest.fixture(scope="module")
def bench():
    return load_tool("bench_gpu")


def run(*arguments):
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_the_dry_run_measures_everything(tmp_path):
    done = run("--dry-run", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    figures = {f["name"]: f for f in json.loads((tmp_path / "figures.json").read_text())}
    assert "DRY RUN ON CPU: no figure means anything" in done.stdout
    assert all(name in done.stdout for name in figures)
    targets = {name: f["target"] for name, f in figures.items() if f["target"]}
    assert targets == {
        "attention, 2 x 70: keys and values of bandwidth": "> 80",
        "host gap, 1 users": "< 5",
        "host gap, 2 users": "< 5",
        "serve, 1 user: weights and KV of bandwidth": "> 85",
        "serve, prompts: of the peak": "> 60",
    }
    may_be_none = ("host gap", "products, ")  # of a product the reference may give the same bits
    assert all(f["value"] > 0 for name, f in figures.items() if not name.startswith(may_be_none))
    assert figures["attention: largest error against float32"]["value"] < 1e-4
    assert figures["products, experts, 2: largest error against float32"]["value"] < 1e-4
    assert figures["products, experts of 4 bits, 2: largest error against float32"]["value"] < 1e-4


def test_what_the_targets_are_about(bench):
    figures = {
        "copy bandwidth": 4000.0, "matrix product peak": 700.0, "bytes read for a token of 1 user": 16e9,
        "operations of a token": 14e9, "serve, 1 user: output": 200.0, "serve, prompts: input": 30000.0,
        "serve, 1 user: ITL, median": 5.0, "step, 1 decoding: time": 4.0,
        "serve, 16 users: ITL, median": 8.0, "step, 16 decoding: time": 8.5,
    }  # fmt: skip
    found = {f.name: f for f in bench.derived(figures)}
    assert {name: round(f.value, 3) for name, f in found.items()} == {
        "host gap, 1 users": 20.0,
        "host gap, 16 users": 0.0,
        "serve, 1 user: weights and KV of bandwidth": 80.0,
        "serve, prompts: of the peak": 60.0,
    }
    assert "target > 85 %: MISSED" in found["serve, 1 user: weights and KV of bandwidth"].line()
    assert "target > 60 %: met" in found["serve, prompts: of the peak"].line()


def test_it_measures_no_cpu():
    done = run("kernels")
    assert done.returncode == 1 and "this is cpu; the benchmark is for a GPU" in done.stderr


def test_weights_are_drawn_first(tmp_path):
    done = run("serve", "--dry-run", "--folder", str(tmp_path))
    assert done.returncode == 1 and "`steps` draws them, with the same --folder" in done.stderr
