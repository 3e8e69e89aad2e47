"""Other weights and edited code for a running engine, as a trainer and a researcher at an editor meet them."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fake_engine import VOCAB_SIZE, write_tokenizer
from gguf_files import EXPERTS, model_tensors, write_model
from running_engine import Running, request
from running_server import Server
from safetensors.numpy import load_file, save_file
from toy_model import write_checkpoint

from jaxserve import LLM, SamplingParams, models, runner, update
from jaxserve.config import DeviceOptions, ModelOptions
from jaxserve.errors import CheckpointError, ConfigError, EngineStopped, InvalidParameter
from jaxserve.host_memory import HostMemory
from jaxserve.loading import load_model
from jaxserve.request import Update
from jaxserve.scaled import Scaled, leaves_of
from jaxserve.spec import ParamSpec

HERE = Path(__file__).parent
TOY = (HERE / "toy_model.py").read_text()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The model that counts: with a weight of 2 it says twice the last token, and one."""
    models.ARCHITECTURES["ToyForCausalLM"] = "toy_model"
    yield write_checkpoint(tmp_path_factory.mktemp("toy"))
    del models.ARCHITECTURES["ToyForCausalLM"]


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    return weighing(2, tmp_path_factory.mktemp("twice"))


@pytest.fixture(scope="module")
def running(toy):
    with Running(toy, pages=64, length=64) as running:
        yield running


@pytest.fixture
def engine(running):
    """One that counts, whatever it was given before."""
    if running.engine.info.weights_version:
        give(running, 1)
    return running


def weighing(value, path):
    write_checkpoint(path)
    save_file({"one": np.full(1, value, np.float32)}, path / "model.safetensors")
    return path


def give(engine, value, in_flight="wait"):
    return engine.thread.update(Update(in_flight=in_flight), {"one": np.full(1, value, np.float32)})


def test_the_next_step_is_of_the_new_weights_and_nothing_is_compiled(engine, twice):
    compiled = []
    arrays = [jnp.full(1, 3.0), np.full(1, 3, ml_dtypes.bfloat16), np.full(1, 3, np.float16)]
    first = engine.thread.info.weights_version
    assert engine.one([3], max_tokens=3).tokens == [4, 5, 6]
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **kwargs: compiled.append(event) if "backend_compile" in event else None
    )
    assert engine.thread.update(Update(path=str(twice))).info.weights_version == first + 1
    assert engine.one([3], max_tokens=3).tokens == [7, 15, 31]
    for version, array in enumerate(arrays, first + 2):
        assert engine.thread.update(Update(), {"one": array}).info.weights_version == version
        assert engine.one([3], max_tokens=2).tokens == [10, 31]
    assert engine.metric("jaxserve_weights_version") == first + 4 == engine.thread.info.weights_version
    assert not compiled
    assert engine.programs("serving") == engine.programs("update") == 0


def test_keys_and_values_of_the_old_weights_are_not_found(engine):
    prompt = list(range(20))
    engine.one(prompt, max_tokens=1)
    assert engine.one(prompt, max_tokens=1).cached == 16
    give(engine, 1)
    engine.wait_idle()
    engine.engine.scheduler.check_integrity()
    assert engine.one(prompt, max_tokens=1).cached == 0
    assert engine.one(prompt, max_tokens=1).cached == 16


def test_requests_are_answered_while_weights_are_read(engine, monkeypatch):
    reading, go_on, weights_of = threading.Event(), threading.Event(), runner.weights_of

    def slowly(*arguments):
        reading.set()
        assert go_on.wait(60)
        return weights_of(*arguments)

    monkeypatch.setattr(runner, "weights_of", slowly)
    with ThreadPoolExecutor(1) as pool:
        switching = pool.submit(give, engine, 2)
        assert reading.wait(60)
        assert engine.one([3], max_tokens=2).tokens == [4, 5]
        go_on.set()
        switching.result(60)
    assert engine.one([3], max_tokens=2).tokens == [7, 15]


@contextmanager
def in_flight(engine, monkeypatch, **requests):
    """A future of what the requests get, which have begun, and a semaphore: every further step takes one of it."""
    steps, waits, launch = threading.Semaphore(2), threading.Event(), engine.engine.runner.launch

    def one_by_one(plan):
        if not steps.acquire(blocking=False):
            waits.set()
            assert steps.acquire(timeout=60)
        return launch(plan)

    monkeypatch.setattr(engine.engine.runner, "launch", one_by_one)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(engine.run, requests)
        assert waits.wait(60)
        try:
            yield future, steps
        finally:
            steps.release(1000)


def switch(engine, value, *, abort):
    prepared = engine.engine.prepare(Update(), {"one": np.full(1, value, np.float32)})
    (done,) = engine.engine.switch(prepared, abort=abort)
    return done


@pytest.mark.parametrize("n", [4, 6])
def test_what_has_begun_finishes_on_its_weights_and_the_others_wait(engine, monkeypatch, n):
    """Four run at once, so that "late" has not begun, nor have two of six continuations."""
    requests = {"long": request("long", [1], max_tokens=30, n=n), "late": request("late", [3], max_tokens=2)}
    with in_flight(engine, monkeypatch, **requests) as (future, steps):
        done = switch(engine, 2, abort=False)
        steps.release(1000)
        results = future.result(60)
        done.result(60)
    assert results.pop(("late", 0)).tokens == [7, 15]
    assert [r.tokens for r in results.values()] == [list(range(2, 32))] * n
    engine.wait_idle()


def test_what_has_begun_is_told_that_it_did_not_finish(engine, monkeypatch):
    requests = {"long": request("long", [1], max_tokens=60, n=4), "late": request("late", [3], max_tokens=2)}
    with in_flight(engine, monkeypatch, **requests) as (future, steps):
        done = switch(engine, 2, abort=True)
        steps.release(1000)
        results = future.result(60)
        done.result(60)
    assert results.pop(("late", 0)).tokens == [7, 15]
    for result in results.values():
        assert result.finish == "error" and result.error == "ModelChanged"
        assert result.tokens == list(range(2, 2 + len(result.tokens))) != list(range(2, 62)), "none of other weights"
    engine.wait_idle()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, r"missing tensor \(1\): \['one'\]"),
        ({"one": np.ones(1, np.float32), "two": np.ones(1)}, r"unexpected tensor \(1\): \['two'\]"),
        ({"one": np.ones(2, np.float32)}, r"\['one'\] is \[2\], the model needs \[1\]"),
        ({"one": np.ones(1)}, r"unsupported dtype, .*: \['one'\] is float64"),
        ({"one": 1.0}, r"\['one'\] is a float, not an array"),
        ({"one": None}, r"\['one'\] is a NoneType, not an array"),
        ([np.ones(1, np.float32)], r"unexpected tensor \(1\): \[0\]"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused_by_name(toy, tree, message):
    with pytest.raises(CheckpointError, match=message):
        update.weights_of(served(toy), ModelOptions(), tree, 0)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(engine, twice, tmp_path, monkeypatch):
    first = engine.thread.info.weights_version

    def refused(path, kind, message):
        with pytest.raises(kind, match=message):
            engine.thread.update(Update(path=str(path)))
        assert engine.one([3], max_tokens=2).tokens == [4, 5]

    refused(tmp_path / "none", ConfigError, "no checkpoint directory or file .*none")
    refused(
        write_checkpoint(tmp_path / "short", 32), ConfigError, "max_positions is 32, not 64; start a server with it"
    )
    refused(HERE / "goldens" / "llama2", ConfigError, "is a model of llama; served is one of toy_model")
    other = write_checkpoint(tmp_path / "other")
    save_file({"two": np.ones(3, np.float32)}, other / "model.safetensors")
    refused(other, CheckpointError, r"missing tensor \(1\): one\n.*unexpected tensor \(1\): two")
    monkeypatch.setattr(update, "host_memory", lambda: HostMemory(total=8, free=2))
    refused(twice, ConfigError, r"other weights need 0.00 GiB beside those that are served.*--memory-utilization")
    assert engine.thread.info.weights_version == first


def test_an_engine_that_ends_does_not_leave_an_update_waiting(engine, monkeypatch):
    """The last that this one does."""
    with in_flight(engine, monkeypatch, long=request("long", [1], max_tokens=60)) as (future, steps):
        held = switch(engine, 2, abort=False)
        steps.release(1)
        while not engine.engine.scheduler.holding:  # which stays, for the next step waits
            time.sleep(0.001)
        engine.engine.stop()
        steps.release(1000)
        assert future.result(60)["long", 0].error == "EngineStopped"
    engine.thread.stop()
    for done in (held, switch(engine, 2, abort=False)):
        with pytest.raises(EngineStopped):
            done.result(60)
    with pytest.raises(EngineStopped):
        give(engine, 2)


def served(path, device=DeviceOptions(compile_cache_dir=""), **options):
    return load_model(ModelOptions(**options), device, path, lambda message: None)


def leaves_equal(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["llama2", "phi3", "qwen3_moe"])
def test_trees_and_checkpoints_become_what_loading_makes_of_them(name, compiler):
    """Matrices laid out for the CPU's kernels, several in one tensor, and stacks of experts."""
    path = HERE / "goldens" / name
    now = served(path)
    tensors = {k: w for file in path.glob("*.safetensors") for k, w in load_file(file).items()}

    def leaf(spec):
        return np.stack([tensors[n][slice(*(spec.rows or (None,)))] for n in spec.names]).reshape(spec.shape)

    tree = jax.tree.map(leaf, now.model.param_specs(now.config), is_leaf=lambda x: isinstance(x, ParamSpec))
    assert leaves_equal(update.weights_at(now, ModelOptions(), path, 0), now.params)
    given = update.weights_of(now, ModelOptions(), tree, 0)
    assert leaves_equal(given, now.params)
    assert leaves_equal(update.weights_of(now, ModelOptions(), jax.tree.map(jnp.asarray, tree), 0), now.params)
    plain = served(path, DeviceOptions(compile_cache_dir="", attention="reference"))
    arrays = jax.tree.map(jnp.asarray, tree)
    copies = [update.weights_of(plain, ModelOptions(), given, 0) for given in (tree, arrays)]
    for array, other in zip(jax.tree.leaves(tree), jax.tree.leaves(arrays), strict=True):
        array[...] = 0
        other.delete()
    assert leaves_equal(given, now.params), "the caller's arrays are the caller's"
    assert all(leaves_equal(copy, plain.params) for copy in copies)

    quantised = served(path, quantization="q8_0")
    assert leaves_equal(update.weights_at(quantised, ModelOptions(quantization="q8_0"), path, 0), quantised.params)
    with pytest.raises(CheckpointError, match="is not quantised, and in the weights that are served Q8_0"):
        update.weights_at(quantised, ModelOptions(), path, 0)


def test_weights_that_are_kept_quantised_take_others_alike():
    """Without the CPU's kernels."""
    path, device = HERE / "goldens" / "llama3", DeviceOptions(compile_cache_dir="", attention="reference")
    options = ModelOptions(quantization="q8_0")
    now = served(path, device, quantization="q8_0")
    assert any(isinstance(leaf, Scaled) for leaf in leaves_of(now.params))
    assert leaves_equal(update.weights_at(now, options, path, 0), now.params)
    tensors = {k: w for file in path.glob("*.safetensors") for k, w in load_file(file).items()}
    specs = now.model.param_specs(now.config)
    tree = jax.tree.map(lambda s: tensors[s.name].reshape(s.shape), specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    for given in (tree, jax.tree.map(jnp.asarray, tree)):
        assert leaves_equal(update.weights_of(now, options, given, 0), now.params)
    with pytest.raises(CheckpointError, match=r"becomes \[.* and in the weights that are served it is .* of int8"):
        update.weights_at(now, ModelOptions(), path, 0)


def test_experts_that_are_kept_quantised_take_others_alike(tmp_path):
    keys = {f"qwen3moe.{key}": value for key, value in (EXPERTS | {"expert_feed_forward_length": 64}).items()}
    tensors, device = (
        model_tensors("qwen3moe", experts=True),
        DeviceOptions(compile_cache_dir="", attention="reference"),
    )
    plain, small = (
        write_model(tmp_path / f"{kind}.gguf", "qwen3moe", tensors=tensors, metadata=keys, kind=kind)
        for kind in ("F32", "Q4_0")
    )
    options = ModelOptions(quantization="q8_0")
    now = served(plain, device, quantization="q8_0")
    assert sum(isinstance(leaf, Scaled) and leaf.stacked for leaf in leaves_of(now.params)) == 2 * 3
    assert leaves_equal(update.weights_at(now, options, plain, 0), now.params)
    tree = served(plain, device).params
    assert leaves_equal(update.weights_of(now, options, tree, 0), now.params)
    now = served(small, device)
    assert leaves_equal(update.weights_at(now, ModelOptions(), small, 0), now.params)
    with pytest.raises(CheckpointError, match=r"becomes \[.* of float32 on its devices, .* it is .* of int4"):
        update.weights_of(now, ModelOptions(), tree, 0)


def test_llm_update_params(tmp_path):
    code = tmp_path / "toy.py"
    path = with_text(tmp_path, code)
    greedy = SamplingParams(temperature=0, max_tokens=3)
    small = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 64, "num_kv_pages": 8}
    with LLM(str(path), model_code=str(code), warmup="lazy", **small) as llm:
        assert llm.generate([5], greedy).weights_version == 0
        assert llm.update_params({"one": jnp.full(1, 2.0)}) == 1
        output = llm.generate([5], greedy)
        assert output.outputs[0].token_ids == [11, 23, 47] and output.weights_version == 1
        with pytest.raises(CheckpointError, match="missing tensor"):
            llm.update_params({})
        with pytest.raises(InvalidParameter, match="params is None"):
            llm.update_params(None)
        assert llm.update_params(path) == 2
        assert llm.generate([5], greedy).outputs[0].token_ids == [6, 7, 8]


def with_text(path, code):
    """A checkpoint of the toy with a tokenizer, whose code is at `code`."""
    code.write_text(TOY.replace("VOCAB = 50", f"VOCAB = {VOCAB_SIZE}"))
    return write_checkpoint(write_tokenizer(path / "checkpoint"))


def edit(file, *changes):
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)


def test_edited_code(toy, tmp_path):
    file = tmp_path / "toy.py"
    file.write_text(TOY)
    with Running(toy, pages=64, length=64, warmup="lazy", code=str(file)) as engine:
        prompt = list(range(20))
        assert [engine.one(prompt, max_tokens=2).tokens for _ in range(2)] == [[20, 21]] * 2

        def refused(kind, message, *changes):
            edit(file, *changes)
            with pytest.raises(kind, match=message):
                engine.thread.update(Update(code=True))
            assert engine.one(prompt, max_tokens=2).tokens == [20, 21]
            file.write_text(TOY)

        refused(
            ConfigError, r"toy\.py:\d+: SyntaxError", ("def forward(", "def forward("), ("return out", "return (out")
        )
        refused(ConfigError, r"forward's hidden is \[13, 2\]", ("out[:, 0, :1]", "out[:, 0, :]"))
        four = "at * 0, at * 0, at * 0"
        heads = [("1, 1, 1, 1, 2,", "1, 1, 1, 1, 4,"), ("[said, said]", "[said] * 4")]
        heads += [("[jnp.full_like(at, 50.0), jnp.zeros_like(at)]", f"[at * 0 + 50, {four}]")]
        refused(ConfigError, "another KV cache", *heads, ("[at, jnp.zeros_like(at)]", f"[at, {four}]"))
        windows = [("class Config:\n", "class Config:\n    windows = (4,)\n"), ("scale=1.0)", "scale=1.0, window=4)")]
        refused(ConfigError, "other sliding windows", *windows)
        refused(ConfigError, "another vocabulary", ("VOCAB = 50", "VOCAB = 51"))
        refused(CheckpointError, "missing tensor .1.: two", ('"width", "one"', '"width", "two"'))
        assert engine.thread.info.weights_version == 0

        edit(file, ("- 1.0) / 10\n\n\ndef expected", "- 2.0) / 10\n\n\ndef expected"))
        assert engine.thread.update(Update(code=True)).info.weights_version == 1
        result = engine.one(prompt, max_tokens=2)
        assert result.tokens == [21, 23] and result.cached == 0
        assert engine.programs("update") >= 1
        edit(file, ('{"one": weight', '{"uno": weight'), ('p["one"]', 'p["uno"]'))
        assert engine.thread.update(Update(code=True)).info.weights_version == 2
        assert engine.one(prompt, max_tokens=2).tokens == [21, 23]
        engine.thread.update(Update(), {"uno": np.full(1, 2, np.float32)})
        edit(file, ('{"uno": weight', '{"one": weight'), ('p["uno"]', 'p["one"]'))
        with pytest.raises(ConfigError, match="other weights than those that are served, which no checkpoint holds"):
            engine.thread.update(Update(code=True))
        assert engine.one([3], max_tokens=2).tokens == [8, 18]


def test_a_server_from_edit_to_edit_and_from_weights_to_weights(tmp_path):
    file = tmp_path / "toy.py"
    path = with_text(tmp_path, file)
    flags = ["--max-num-seqs=2", "--max-num-batched-tokens=8", "--max-model-len=64", "--num-kv-pages=8"]
    flags += [f"--model-code={file}", "--reload", "--admin-key=secret", "--warmup=lazy"]
    with Server(*flags, model=path) as server:

        def says(version):
            answer = server.client.post(
                "/v1/completions", json={"prompt": [5], "max_tokens": 3, "temperature": 0, "return_token_ids": True}
            )
            assert answer.headers["x-jaxserve-weights-version"] == str(version)
            return answer.json()["choices"][0]["token_ids"]

        assert says(0) == [6, 7, 8]
        good = file.read_text()
        file.write_text("def broken(:\n")
        time.sleep(1)
        assert says(0) == [6, 7, 8]
        file.write_text(good.replace("- 1.0) / 10\n\n\ndef expected", "- 2.0) / 10\n\n\ndef expected"))
        server.wait_for("the edit", lambda: server.metric("jaxserve_weights_version") == 1)
        assert says(1) == [7, 9, 11]

        key = {"Authorization": "Bearer secret"}
        new = write_checkpoint(write_tokenizer(tmp_path / "new"))
        save_file({"one": np.full(1, 2, np.float32)}, new / "model.safetensors")
        answer = server.client.post("/admin/update_params", json={"path": str(new)}, headers=key)
        assert answer.status_code == 200 and answer.json()["weights_version"] == 2
        assert says(2) == [12, 26, 54]
        answer = server.client.post("/admin/update_params", json={"path": str(tmp_path)}, headers=key)
        assert answer.status_code == 400 and str(tmp_path) in answer.json()["error"]["message"]
        assert server.client.get("/v1/models").json()["data"][0]["meta"]["weights_version"] == 2

        os.kill(server.engine_pid(), signal.SIGKILL)
        server.wait_for("the end", lambda: server.client.get("/health").status_code == 503)
        server.wait_for("the next engine", lambda: server.client.get("/health").status_code == 200)
        assert says(2) == [12, 26, 54], "not what the first engine began with"
