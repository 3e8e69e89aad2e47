"""Single steps, timed and taken apart: the parts are the whole, and the kernels are named."""

import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from jaxserve import cli, native, profile
from jaxserve.config import DeviceOptions, EngineOptions, ScheduleOptions
from jaxserve.errors import ConfigError
from jaxserve.hub import resolve_model
from jaxserve.metrics import EngineMetrics
from jaxserve.native.build import BuildError
from jaxserve.profile import Case
from jaxserve.runner import Runner

LAYERS = 4


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """The embedded model in small steps. A step from the compile cache may have other scopes: another source's."""
    setting = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, setting)
    jax.config.update(setting, True)
    options = EngineOptions(
        schedule=ScheduleOptions(max_num_seqs=4, max_num_batched_tokens=32),
        device=DeviceOptions(block_size=16, num_kv_pages=16, warmup="lazy"),
    )
    yield Runner(options, resolve_model(None), EngineMetrics("test"), lambda message: None)
    jax.config.update(setting, before)


@pytest.mark.parametrize("case", [Case(3, 1, 20), Case(1, 20, 0), Case(1, 20, 40), Case(1, 1, 0)], ids=str)
def test_the_parts_of_a_step_are_the_whole(runner, case) -> None:
    found = profile.profile(runner, case, steps=2)
    assert sum(p.ms for p in found.parts) == pytest.approx(found.ms)
    assert all(p.ms >= 0 for p in found.parts)
    assert len({(p.where, p.operation) for p in found.parts}) == len(found.parts)
    where = {p.where for p in found.parts}
    always = {"q", "k", "v", "o", "gate", "up", "down", "logits", "attention", "norm", "sample", "host"}
    assert always <= where <= always | {"rope", "embed", "forward", "between", "other"}


def test_the_kernels_are_named_with_their_calls(runner) -> None:
    try:
        native.load()
    except BuildError as error:
        pytest.skip(str(error))
    found = profile.profile(runner, Case(2, 1, 20), steps=3)
    calls = {(p.where, p.operation): p.calls for p in found.parts if p.operation.startswith("jaxserve_")}
    products = {(name, "jaxserve_linear"): LAYERS for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert calls == products | {
        ("logits", "jaxserve_linear"): 1,
        ("embed", "jaxserve_embed"): 1,
        ("attention", "jaxserve_ragged_paged_attention"): LAYERS,
        ("norm", "jaxserve_rms_norm"): 2 * LAYERS + 1,
        ("rope", "jaxserve_rotate"): 2 * LAYERS,
        ("sample", "jaxserve_sample"): 1,
    }
    lines = found.table().splitlines()
    assert lines[-1].split()[:2] == ["whole", "step"] and lines[-1].endswith(" 100.0")
    assert sum(float(line.split()[-1]) for line in lines[2:-1]) == pytest.approx(100, abs=0.05 * len(lines))


def test_steps_are_timed_and_what_they_read_is_counted(runner) -> None:
    timing = profile.measure(runner, Case(3, 1, 20), steps=4, warm=0)
    assert len(timing.seconds) == 4 and timing.shape.seqs == 4
    assert timing.weight_bytes == runner.info.device_bytes["weights"], "the embedding is the output's matrix"
    shown = timing.table()
    assert "Step: decode 3, context 20" in shown and re.search(r"Median step \(ms\): +\d+\.\d\d", shown)
    params = runner.params
    assert profile.weights_read(params | {"unembed": params["embed"]}) == timing.weight_bytes


def test_the_pages_of_the_context_are_memory_that_was_written(runner) -> None:
    """What never was is one page of zeros to the processor, and read at its cache's speed."""
    profile.measure(runner, Case(2, 1, 20), steps=1, warm=0)
    pages = np.asarray(runner._state.cache).reshape(LAYERS, runner.sizes.num_pages, -1)
    assert (pages[:, [0, 2]] == 1).all(), "of 2 pages a sequence; in the last is the step's own token"
    assert (pages[:, [1, 3]] == 1).any()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(5, 1, 0), "batch_size 5 exceeds max_num_seqs 4; lower it, or raise --max-num-seqs"),
        (Case(1, 33, 0), "prefill 33 exceeds max_num_batched_tokens 32; lower it, or raise --max-num-batched-tokens"),
        (Case(1, 1, 256), "257 exceeds max_model_len 256; lower it, or raise --max-model-len"),
        (Case(4, 1, 100), "pages of KV cache needed: 28 exceeds num_kv_pages 16; lower it, or raise --num-kv-pages"),
    ],
)
def test_a_step_that_the_engine_would_not_plan_is_refused(runner, case, message) -> None:
    with pytest.raises(ConfigError, match=message):
        case.plan(runner)


def test_the_command(capsys) -> None:
    small = ["--max-num-seqs=2", "--max-num-batched-tokens=32", "--num-kv-pages=32", "--num-iters=1"]
    assert cli.call(["bench", "step", "--batch-size", "1", "2", "--prefill", "8", "--context", "3", *small]) == 0
    shown = capsys.readouterr().out
    assert [line.strip("= ") for line in shown.splitlines() if line.startswith("=")] == [
        f"Step: {what}, context 3" for what in ("decode 1", "decode 2", "prefill 8")
    ]
    assert "llama on cpu" in shown and re.search(r"Memory read by all cores \(GB/s\): +\d", shown)
    assert cli.call(["bench", "step", "--batch-size", "3", *small]) == 2
    assert "batch_size 3 exceeds max_num_seqs 2" in capsys.readouterr().err
    assert cli.call(["bench", "step", "--batch-size", "0"]) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_nested_operations_count_once() -> None:
    spans = [(0, 10, "while"), (2, 4, "a"), (4, 7, "cond"), (5, 6, "b"), (12, 13, "c")]
    assert list(profile.innermost(spans)) == [
        (0, 2, "while"), (2, 4, "a"), (4, 5, "cond"), (5, 6, "b"), (6, 7, "cond"), (7, 10, "while"), (12, 13, "c"),
    ]  # fmt: skip
    assert list(profile.innermost([(0, 5, "a"), (1, 5, "b"), (5, 6, "c")])) == [(0, 1, "a"), (1, 5, "b"), (5, 6, "c")]


def test_operations_at_once_are_told_apart_from_none() -> None:
    pieces = [(0, 4, "a"), (2, 6, "b"), (8, 9, "a"), (8, 9, "a")]
    assert list(profile.concurrent(pieces)) == [(2, ["a"]), (2, ["a", "b"]), (2, ["b"]), (2, []), (1, ["a", "a"])]
    assert list(profile.concurrent([])) == []


def test_an_instruction_belongs_to_the_innermost_scope_or_to_its_weight() -> None:
    text = """
ENTRY %main (p: f32[4]) -> (f32[4], f32[]) {
  %p.1 = f32[4]{0} parameter(0), metadata={op_name="params[1]"}
  %call = (f32[4]{0:T(8,128)}, f32[]) custom-call(%p.1), custom_call_target="kernel", metadata={op_name="jit(f)/a/b/x"}
  wrapped_add.1 = f32[4]{0} fusion(%p.1), kind=kLoop, metadata={op_name="jit(f)/a/while/body/cond/branch_1_fun/add"}
  %bitcast.3 = f32[2,2]{1,0} bitcast(%p.1), metadata={op_name="params[1]"}
  %dot.4 = f32[2,2]{1,0} dot(%wrapped_add.1, %bitcast.3), lhs_contracting_dims={0}
  ROOT %copy.2 = (f32[4]{0}, f32[]) copy(%call)
}
"""
    assert profile.instructions(text, ["k", "q"]) == {
        "p.1": ("other", "parameter"),
        "call": ("b", "kernel"),
        "wrapped_add.1": ("a", "fusion"),
        "bitcast.3": ("other", "bitcast"),
        "dot.4": ("q", "dot"),
        "copy.2": ("other", "copy"),
    }


def test_without_the_kernels_the_matrices_are_named_too() -> None:
    options = EngineOptions(
        schedule=ScheduleOptions(max_num_seqs=1, max_num_batched_tokens=8),
        device=DeviceOptions(num_kv_pages=4, warmup="lazy", attention="reference"),
    )
    runner = Runner(options, resolve_model(None), EngineMetrics("test"), lambda message: None)
    found = profile.profile(runner, Case(1, 1, 20), steps=1)
    assert {"q", "k", "v", "o", "gate", "up", "down", "logits"} <= {p.where for p in found.parts}
    operations = {(p.where, p.operation) for p in found.parts}
    assert not {("q", "jaxserve_linear"), ("other", "dot")} & operations
    assert sum(p.ms for p in found.parts) == pytest.approx(found.ms)
