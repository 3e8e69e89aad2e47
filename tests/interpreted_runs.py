"""Runs gpu_interpreted.py or tpu_interpreted.py, programs of their own, and reads what they found."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def runs_of(program: str) -> dict[str, dict]:
    """What each run of a program of this directory found, by the run's name."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / program)],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {run["name"]: run for run in runs}
