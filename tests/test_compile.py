"""`jaxserve compile`: a folder with which a start compiles nothing, wherever it is copied, and what is said if not."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from gguf_files import write_model

from jaxserve import cli, native
from jaxserve.baked import report
from jaxserve.client import replicas
from jaxserve.compile_cache import MANIFEST
from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions, ScheduleOptions
from jaxserve.errors import ConfigError
from jaxserve.hub import resolve_model
from jaxserve.loading import start_loading
from jaxserve.metrics import EngineMetrics
from jaxserve.runner import Runner

LLAMA = Path(__file__).parent / "goldens" / "llama2"
FLAGS = ["--max-num-seqs", "1", "--max-num-batched-tokens", "4", "--block-size", "4", "--max-model-len", "64"]
REFERENCE = ["--attention", "reference", "--dtype", "float32"]


def started(cache):
    """The counters of a start: (programs compiled, loaded)."""
    metrics = EngineMetrics("test")
    options = EngineOptions(
        model=ModelOptions(dtype="float32", max_model_len=64),
        schedule=ScheduleOptions(max_num_seqs=1, max_num_batched_tokens=4),
        device=DeviceOptions(attention="reference", block_size=4, warmup="full", compile_cache_dir=str(cache)),
    )
    Runner(options, LLAMA, metrics, lambda said: None).close()
    labels = {"model_name": "test", "engine": "0", "phase": "warmup"}
    names = ("jaxserve_xla_compiles_total", "jaxserve_xla_loads_total")
    return tuple(metrics.registry.get_sample_value(name, labels) for name in names)


@pytest.fixture(scope="module")
def config_alone(tmp_path_factory):
    """What is needed of a model: its config.json."""
    path = tmp_path_factory.mktemp("config alone")
    shutil.copy(LLAMA / "config.json", path)
    return path


@pytest.fixture(scope="module")
def told():
    """What the command printed."""
    return io.StringIO()


@pytest.fixture(scope="module")
def baked(config_alone, told, tmp_path_factory):
    out = tmp_path_factory.mktemp("baked") / "out"
    with contextlib.redirect_stdout(told):
        assert cli.call(["compile", str(config_alone), str(out), *FLAGS, *REFERENCE]) == 0
    return out


def test_a_start_from_a_copied_folder_compiles_nothing(baked, tmp_path, caplog):
    copy = shutil.copytree(baked, tmp_path / "elsewhere")
    made, loaded = started(copy)
    assert made == 0 and loaded == len(list((copy / "programs").iterdir()))
    assert "this start needs" not in caplog.text


def test_nor_does_another_process_and_it_answers(baked, tmp_path):
    """By XLA's own word, not only by our counter."""
    copy = shutil.copytree(baked, tmp_path / "elsewhere")
    program = f"""
import jax
from jaxserve import native
if {native.loaded()}:  # in the process that compiled, as other tests may have
    native.load()
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: compiled.append(event) if "backend_compile" in event else None
)
from pathlib import Path
from running_engine import EngineThread, request
from jaxserve.config import *
options = EngineOptions(
    model=ModelOptions(dtype="float32", max_model_len=64),
    schedule=ScheduleOptions(max_num_seqs=1, max_num_batched_tokens=4),
    device=DeviceOptions(attention="reference", block_size=4, compile_cache_dir={str(copy)!r}, warmup="full"),
)
import queue
deltas = queue.Queue()
engine = EngineThread(options, Path({str(LLAMA)!r}), model_name="test", deliver=deltas.put)
engine.start()
engine.wait_ready()
engine.submit(request("one", [3, 5, 7], max_tokens=4))
tokens = []
while len(tokens) < 4:
    tokens += [t for delta in deltas.get(timeout=60) for t in delta.token_ids]
print(engine.metrics_text().decode())
engine.stop()
print("compiled", len(compiled), "tokens", len(tokens))
"""
    paths = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "compiled 0 tokens 4" in done.stdout
    assert 'jaxserve_xla_compiles_total{engine="0",model_name="test",phase="warmup"} 0.0' in done.stdout


def test_nothing_is_worked_out_for_a_cache_that_was_not_filled(baked, tmp_path):
    def asked():
        raise AssertionError("asked")

    for directory in ("", str(tmp_path)):
        report(directory, asked)
    with pytest.raises(AssertionError, match="asked"):
        report(str(baked), asked)


def test_the_command_says_how_to_serve(baked, told):
    """And the manifest says for what and with what."""
    (line,) = (line for line in told.getvalue().splitlines() if line.startswith("Serve it:"))
    assert f"--compile-cache-dir={baked}" in line and "--max-num-seqs=1" in line
    manifest = json.loads((baked / MANIFEST).read_text())
    assert manifest["made_with"]["jax"] == jax.__version__ and "jaxlib" in manifest["made_with"]
    assert manifest["made_for"]["max_num_seqs"] == 1 and manifest["made_for"]["attention"] == "reference"
    assert f"--num-kv-pages={manifest['made_for']['num_kv_pages']}" in line
    assert manifest["options"]["block_size"] == 4 and "warmup" not in manifest["options"]


def test_what_does_not_match_is_said(baked, tmp_path, caplog):
    """And what is lacking is compiled, as ever."""
    copy = shutil.copytree(baked, tmp_path / "elsewhere")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["made_for"] |= {"max_num_seqs": 64}
    manifest["made_with"] |= {"jaxlib": "0.11.2", "jaxserve's code": "0" * 40}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    min((copy / "programs").iterdir(), key=lambda program: program.stat().st_size).unlink()
    assert started(copy)[0] == 1
    assert f"this start needs is not all in {copy}" in caplog.text
    assert "max_num_seqs is 64 there and 1 here" in caplog.text and "jaxlib is 0.11.2 there and" in caplog.text
    assert "jaxserve's code is another" in caplog.text
    caplog.clear()
    (copy / MANIFEST).write_text("{")
    assert started(copy)[0] == 0
    assert f"{copy / MANIFEST} cannot be read" in caplog.text


@pytest.mark.parametrize("words", [["out"], [str(LLAMA), "out"]], ids=["from the file", "named"])
def test_the_model_may_be_named_by_a_file_of_settings(words, tmp_path, monkeypatch, capsys):
    told = []

    def instead(options, path, **rest):
        told.append((options, path, rest["ahead"]))
        raise ConfigError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(replicas, "open_engine", instead)
    (tmp_path / "a.toml").write_text(f"model = '{LLAMA}'\nmax_num_seqs = 3\nwarmup = 'lazy'\nport = 80\n")
    assert cli.call(["compile", "--config", "a.toml", *words, "--mesh", "1x2"]) == cli.USAGE
    ((options, path, ahead),) = told
    assert path == LLAMA and ahead and options.schedule.max_num_seqs == 3 and options.device.mesh == "1x2"
    assert options.device.warmup == "full" and options.device.compile_cache_dir == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gs://bucket/out"], "is a url; give a folder"),
        (["a", "b", "c"], "3 words were given"),
        ([], "0 words were given"),
        (["no such model at all", "out"], "not a Hugging Face id"),
    ],
)
def test_bad_words_are_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.call(["compile", *words]) == cli.USAGE
    assert message in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.call(["compile", str(LLAMA), str(tmp_path)]) == cli.USAGE
    assert "holds notes.txt already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="compile_cache_dir s3://bucket is a url"):
        DeviceOptions(compile_cache_dir="s3://bucket")


def test_where_the_stored_types_decide_config_json_is_not_enough(config_alone, compiler, tmp_path, capsys):
    assert cli.call(["compile", str(config_alone), str(tmp_path / "out"), *FLAGS]) == cli.USAGE
    assert "holds no weights, and the CPU's kernels multiply them in the types" in capsys.readouterr().err


CHECKPOINTS = {
    "llama_bf16": {},
    "mixtral": {"dtype": "float32"},
    "phi3": {},
    "embedded": {"quantization": "q8_0"},
    "gguf": {},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shapes_that_are_compiled_for_are_those_of_the_weights(name, compiler, tmp_path):
    path = resolve_model(None) if name == "embedded" else LLAMA.parent / name
    if name == "gguf":
        path = write_model(tmp_path / "model.gguf", kind="Q8_0")
    options = ModelOptions(**CHECKPOINTS[name])
    real, ahead = (
        start_loading(options, DeviceOptions(), path, lambda said: None, ahead=a).result() for a in (False, True)
    )
    described = [jax.tree.map(lambda a: (a.shape, str(a.dtype), a.sharding), loaded.params) for loaded in (real, ahead)]
    assert described[0] == described[1]
    assert real.kv_dtype == ahead.kv_dtype
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(ahead.params))
