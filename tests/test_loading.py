"""A model on its way: its steps are compiled meanwhile, and whatever fails ends the other."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxserve import loading
from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions, ScheduleOptions
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.metrics import EngineMetrics
from jaxserve.runner import Runner
from jaxserve.sizing import Sizing

PATH = Path(__file__).parent / "goldens" / "llama2"
OPTIONS = EngineOptions(
    schedule=ScheduleOptions(max_num_seqs=4, max_num_batched_tokens=16),
    device=DeviceOptions(block_size=4, num_kv_pages=64),
)


def runner(said: list[str]) -> Runner:
    return Runner(OPTIONS, PATH, EngineMetrics("test"), said.append)


def test_steps_are_compiled_while_weights_are_on_their_way(monkeypatch):
    compiled, place = threading.Event(), loading.place_params

    def slow(*arguments, **rest):
        assert compiled.wait(120), "nothing is compiled before the weights are there"
        return place(*arguments, **rest)

    class Said(list):
        def append(self, line: str) -> None:
            super().append(line)
            if line.startswith("compiling steps"):
                compiled.set()

    monkeypatch.setattr(loading, "place_params", slow)
    said = Said()
    made = runner(said)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(made.params))
    first = next(i for i, line in enumerate(said) if line.startswith("compiling steps"))
    assert not any(line.startswith("weights:") for line in said[:first])
    made.close()


def test_weights_are_given_up_when_there_will_be_no_steps(monkeypatch):
    reading, left = threading.Event(), []

    def endless(*arguments):
        report = arguments[-1]
        try:
            for done in range(10**9):
                report(done, 10**9)
                reading.set()
        finally:
            left.append(threading.current_thread())

    def refuse(self):
        assert reading.wait(60)
        raise ConfigError("no room for a KV cache")

    monkeypatch.setattr(loading, "place_params", endless)
    monkeypatch.setattr(Sizing, "trial", refuse)
    with pytest.raises(ConfigError, match="no room"):
        runner([])
    left[0].join(60)
    assert not left[0].is_alive()


def test_weights_that_cannot_be_read_are_the_error(monkeypatch):
    def damaged(*arguments):
        raise CheckpointError("model.safetensors: cannot be read")

    monkeypatch.setattr(loading, "place_params", damaged)
    with pytest.raises(CheckpointError, match="cannot be read"):
        runner([])


def test_progress_says_each_percent_once():
    said: list[str] = []
    loading.load_model(ModelOptions(), DeviceOptions(), PATH, said.append)
    lines = [line for line in said if line.startswith("loading weights")]
    assert lines[0].startswith("loading weights 0 %") and lines[-1].startswith("loading weights 100 %")
    assert len(set(lines)) == len(lines)


def test_a_model_keeps_its_own_length_when_less_is_served():
    options = replace(OPTIONS, model=ModelOptions(max_model_len=64))
    info = Runner(options, PATH, EngineMetrics("test"), lambda line: None).info
    assert (
        info.max_model_len == 64
        and info.max_positions == json.loads((PATH / "config.json").read_text())["max_position_embeddings"]
    )
