"""What tests/test_sharding.py runs in a process of eight CPU devices: a divided model is the same model.

Programs cost most of the time. So models have one layer, two where layers differ, and most engines are held to their
one largest step. On one device an engine has the C++ kernels, as it is served: their programs are a third as large.
"""

import json
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from running_engine import Running, request
from safetensors.numpy import load_file, save_file
from toy_model import write_checkpoint

from jaxserve import cli, models
from jaxserve.batch import Shape
from jaxserve.captured import values
from jaxserve.client import EngineState
from jaxserve.client.replicas import open_engine
from jaxserve.compile_cache import CompileCache
from jaxserve.config import (
    DeviceOptions,
    EngineOptions,
    MeshShape,
    ModelOptions,
    ScheduleOptions,
    engine_options_of,
)
from jaxserve.conformance_mesh import check_divided
from jaxserve.embedding import finished
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.evaluate import Evaluator
from jaxserve.loading import load_model
from jaxserve.metrics import EngineMetrics
from jaxserve.model_code import load_model_code
from jaxserve.models import find_model
from jaxserve.planning.steps import collectives
from jaxserve.request import EMBED, Request, Update
from jaxserve.runner import Runner
from jaxserve.sharding import Partition, bytes_per_device, meshes
from jaxserve.spec import Model, ParamSpec, weight
from jaxserve.tokenizer import load_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
# Query and kv heads: 4 4 (and a vocabulary that is prime), 7 1, and 4 2 for all others but OLMo 2: 6 2.
LAYERS = {"gemma2": 2, "gemma3_untied": 2, "smollm3": 3, "deepseek_v2": 2}
"""Enough for one of each kind; of the others one is enough."""
AS_OTHERS = ("gemma2", "granite", "smollm3")
"""Those whose matrices are divided as another's are; slow."""
FAMILIES = {
    "llama2": ("1x2", "1x3", "1x4", "1x6"),
    "mistral": ("1x6", "1x2", "1x3", "1x4"),
    "qwen2": ("1x3", "1x4"),
    "qwen3": ("1x4", "1x3"),
    "gemma2": ("1x3", "1x4"),
    "gemma3_untied": ("1x2", "1x3", "1x4", "1x6"),
    "phi3": ("1x3",),
    "granite": ("1x3",),
    "smollm3": ("1x3",),
    "olmo2": ("1x2",),
    "mixtral": ("expert=5", "1x3"),
    "qwen3_moe": ("expert=2,model=2", "1x3"),
    "deepseek_v2": ("1x3",),
}
PROMPTS = [(3, 5, 7, 9, 11, 2, 4), (8, 1, 6)]


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """By a golden's name: its checkpoint, with the first layers only."""

    def cut(name, layers=None):
        layers = layers or LAYERS.get(name, 1)
        path = tmp_path_factory.mktemp(name)
        config = json.loads((GOLDENS / name / "config.json").read_text()) | {"num_hidden_layers": layers}
        if name.startswith("gemma"):
            config["layer_types"] = ["sliding_attention", "full_attention"]
        for by_layer in {"layer_types", "no_rope_layers"} & {key for key, value in config.items() if value}:
            config[by_layer] = config[by_layer][:layers]
        (path / "config.json").write_text(json.dumps(config))
        files = sorted((GOLDENS / name).glob("*.safetensors"))
        weights = {k: w for file in files for k, w in load_file(file).items()}
        layer = {k: int(found[1]) if (found := re.search(r"\.layers\.(\d+)\.", k)) else 0 for k in weights}
        save_file({k: w for k, w in weights.items() if layer[k] < layers}, path / "model.safetensors")
        return path

    return cut


def running(path, mesh, **options):
    defaults = {"pages": 32, "seqs": 2, "budget": 8, "warmup": "lazy"}
    return Running(path, mesh=mesh, **defaults | options)


def engines(engine):
    return getattr(engine.engine, "engines", [engine.engine])


def one_shape_only(engine):
    for one in engines(engine):
        one.runner.shapes = (max(one.runner.shapes),)


def answers(path, mesh, requests, *, one_shape=True, **options):
    with running(path, mesh, **options) as engine:
        if one_shape:
            one_shape_only(engine)
        return engine.run({r.id: r for r in requests}), engine.engine.info


@pytest.fixture(scope="session")
def alone(family):
    """By name: a family's path, and its greedy answers on one device."""
    known = {}

    def of(name):
        if name not in known:
            path = family(name)
            known[name] = path, answers(path, None, greedy())[0]
        return known[name]

    return of


def greedy(count=2):
    return [request(str(i), [t + i // 2 for t in PROMPTS[i % 2]], max_tokens=5, logprobs=2) for i in range(count)]


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, result in want.items():
        assert got[key].tokens == result.tokens and got[key].finish == result.finish
        for mine, theirs in zip(got[key].logprobs, result.logprobs, strict=True):
            assert mine.top_ids == theirs.top_ids and mine.rank == theirs.rank
            np.testing.assert_allclose(mine.top_logprobs, theirs.top_logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=[pytest.mark.slow] if i or name in AS_OTHERS else [])
        for name, few in FAMILIES.items()
        for i, mesh in enumerate(few)
    ],
)
def test_a_divided_model_answers_as_on_one_device(alone, name, mesh):
    path, want = alone(name)
    assert_same(answers(path, mesh, greedy())[0], want)


def test_so_does_one_whose_cache_is_bytes_and_scales(family):
    path = family("qwen3")
    assert_same(answers(path, "1x2", greedy(), cache="int8")[0], answers(path, None, greedy(), cache="int8")[0])


@pytest.mark.parametrize("mesh", ["2x4", pytest.param("4x2", marks=pytest.mark.slow)])
def test_so_do_replicas_and_they_add_up(family, mesh):
    path = family("llama_bias")
    want, one = answers(path, None, greedy(8))
    got, info = answers(path, mesh, greedy(8))
    assert_same(got, want)
    replicas = MeshShape.parse(mesh).data
    assert info.mesh == mesh and one.mesh == "1x1"
    assert info.max_num_seqs == replicas * one.max_num_seqs and info.num_pages == replicas * one.num_pages
    assert info.max_model_len == one.max_model_len and info.max_num_batched_tokens == one.max_num_batched_tokens
    assert info.num_params == one.num_params and info.vocab_size == one.vocab_size


def test_sampling_and_logprobs_are_the_same_in_every_shape_of_step(family):
    path = family("llama2")
    requests = [
        request("seeded", PROMPTS[0], max_tokens=6, temperature=0.9, top_p=0.95, seed=7, logprobs=3, prompt_logprobs=2),
        request(
            "held back", PROMPTS[1], max_tokens=6, temperature=1.0, top_k=40, seed=8, n=2, repetition_penalty=1.3,
            logit_bias={5: 2.0}, banned_token_ids=(6,),
        ),
    ]  # fmt: skip
    want, _ = answers(path, None, requests, one_shape=False)
    got, _ = answers(path, "1x2", requests, one_shape=False)
    assert_same(got, want)
    for mine, theirs in zip(got["seeded", 0].prompt_logprobs[1:], want["seeded", 0].prompt_logprobs[1:], strict=True):
        assert mine.top_ids == theirs.top_ids
        np.testing.assert_allclose(mine.top_logprobs, theirs.top_logprobs, atol=1e-4)


def test_so_are_several_steps_in_one_launch(family):
    """Sequences that end in the midst of a launch, too, at a stop id or a length."""
    path = family("llama2")
    requests = [
        request("ends", PROMPTS[0], max_tokens=9, temperature=1.0, seed=3, logprobs=1, stop_token_ids=(60, 128)),
        request("held back", PROMPTS[1], max_tokens=7, temperature=0.9, seed=8, repetition_penalty=1.3, min_tokens=2),
    ]
    want, _ = answers(path, None, requests, one_shape=False)
    got, _ = answers(path, "1x2", requests, one_shape=False, decode_steps=4)
    assert want["ends", 0].finish == "stop" and len(want["ends", 0].tokens) == 4, "the third token of four steps"
    assert_same(got, want)


def test_so_are_the_values_inside(family, tmp_path):
    path, capture = family("llama2"), ["layers.0.mlp", "hidden"]
    (want, info), (got, _) = (answers(path, mesh, greedy(), capture=capture) for mesh in (None, "1x3"))
    assert_same(got, want)
    for key in want:
        for tap, mine, theirs in zip(info.taps, got[key].captured, want[key].captured, strict=True):
            mine, theirs = (values(tap, b"".join(pieces)) for pieces in (mine, theirs))
            np.testing.assert_allclose(mine, theirs, atol=1e-4 * np.abs(theirs).max(), err_msg=tap.name)
    text = Path(models.__file__).with_name("llama.py").read_text()
    rotated = 'rotate(project(p, "q", h, out=2), positions, c.rope)'
    assert rotated in text
    (tmp_path / "mine.py").write_text(text.replace(rotated, f'tap({rotated}, f"q.{{layer}}")'))
    with pytest.raises(
        ConfigError, match=r"'q.0': \[4, \d+\] a token would be filled up to \[6, \d+\] to be divided over 3"
    ):
        running(path, "1x3", code=str(tmp_path / "mine.py"), capture=["q.*"]).__enter__()


@pytest.fixture(scope="session")
def four(family):
    """A runner of two layers on four devices."""
    options = EngineOptions(
        model=ModelOptions(dtype="float32"),
        schedule=ScheduleOptions(max_num_seqs=4, max_num_batched_tokens=16),
        device=DeviceOptions(mesh="1x4", block_size=4, num_kv_pages=6400, warmup="lazy"),
    )
    return Runner(options, family("llama3", 2), EngineMetrics("test"), lambda message: None)


@pytest.mark.parametrize("shape", [Shape(4, 4), Shape(16, 4)], ids=str)
def test_a_step_changes_the_cache_in_place_and_a_block_waits_twice(four, shape):
    compiled = four.compiled(shape)
    memory, state = compiled.memory_analysis(), four.programs.state(four.sizes)
    cache = bytes_per_device(state.cache)
    # llama3 has 2 kv heads: each is on two of the four devices.
    assert cache == 2 * 6400 * 4 * (2 * 16) * 4
    assert memory.alias_size_in_bytes == bytes_per_device(state)
    assert memory.temp_size_in_bytes < cache / 10

    waits = [line for line in compiled.as_text().splitlines() if is_collective(line)]
    forward = [line.split('op_name="')[1].split('"')[0] for line in waits if "/forward/" in line]
    assert sorted(name.split("/forward/")[1].split("/")[0] for name in forward) == ["down", "down", "embed", "o", "o"]
    assert all(" all-reduce" in line for line in waits if "/forward/" in line)
    assert all("/sample/" in line for line in waits if "/forward/" not in line), (
        "nothing else is moved but logits and tokens"
    )
    counted = [(c.kind, c.count) for c in collectives(compiled.as_text()) if c.part == "block"]
    assert counted == [("all-reduce", 4)], "what a plan says of it"


def is_collective(line):
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return any(f" {kind}(" in line or f" {kind}-start(" in line for kind in kinds)


@pytest.mark.parametrize(("name", "kind", "mesh"), [("bert", "mean", "1x2"), ("qwen3", "last", "1x4")])
def test_embeddings_of_a_divided_model_are_the_same(name, kind, mesh):
    path = GOLDENS / "embeddings" / name
    golden = np.load(path / "golden.npz")
    tokenizer = load_tokenizer(path)
    with Running(path, seqs=4, budget=128, page=16, pages=20, mesh=mesh, warmup="lazy") as engine:
        one_shape_only(engine)
        info = engine.thread.info.embedding
        deltas = {}
        for i, text in enumerate(golden["texts"]):
            ids = tuple(tokenizer.encode(str(text)))
            engine.thread.submit(Request(id=str(i), prompt_token_ids=ids, params=EMBED, embed=True))
        while len(deltas) < len(golden["texts"]):
            deltas |= {int(d.request_id): finished(d.embedding, info) for d in engine._deltas.get(timeout=120)}
    found = np.stack([deltas[i] for i in range(len(deltas))])
    np.testing.assert_allclose(found, golden[kind], atol=1e-5)


def test_a_text_is_scored_as_on_one_device(family):
    """Beside a reference, with heads and a vocabulary that are filled up."""
    paths = [family("llama2"), family("llama2", layers=2)]
    chunk = np.random.default_rng(0).integers(0, 163, 70).astype(np.int32)

    def scored(mesh):
        device = DeviceOptions(mesh=mesh, attention="reference")
        models = [load_model(ModelOptions(), device, path, lambda message: None) for path in paths]
        return Evaluator(models, len(chunk)).score(chunk)

    one, three = scored(None), scored("1x3")
    assert one.kl.mean() > 1e-3 and len(one.nll) == 34
    for name in ("nll", "reference_nll", "kl"):
        np.testing.assert_allclose(getattr(three, name), getattr(one, name), rtol=1e-4, atol=1e-4)
    assert np.array_equal(three.same_top, one.same_top)


def test_memory_is_told_by_device_and_in_sum(four):
    info = four.info
    assert info.attention == "reference" and info.mesh == "1x4"
    assert info.device_bytes["kv"] == 4 * 2 * 6400 * 4 * (2 * 16) * 4
    plain = info.num_params * 4
    assert plain < info.device_bytes["weights"] < 1.5 * plain, "norms, and k and v, are there more than once"


def test_each_device_gets_its_part_of_a_weight_and_zeros_where_there_is_none():
    hf = json.loads((GOLDENS / "llama_bias" / "config.json").read_text())
    model, config = find_model(hf)  # 6 query heads on 2 kv heads, head_dim 12, width 48
    partition = Partition(meshes(MeshShape(model=4), jax.local_devices())[0], model, config)
    assert (partition.config.kv_heads, partition.config.heads) == (4, 8)
    spec = ParamSpec(("heads", "head_dim", "width"), (6, 12, 48), "q", matrix=True)
    stored = np.random.default_rng(0).normal(size=(72, 48)).astype(np.float32)
    heads = stored.reshape(6, 12, 48)
    array = partition.put([stored], spec, np.dtype(jnp.bfloat16))
    assert array.shape == (8, 12, 48) and array.dtype == jnp.bfloat16
    parts = [np.asarray(s.data, np.float32) for s in sorted(array.addressable_shards, key=lambda s: s.device.id)]
    for part, (first, second) in zip(parts, [(0, 1), (2, None), (3, 4), (5, None)], strict=True):
        np.testing.assert_array_equal(part[0], heads[first].astype(jnp.bfloat16).astype(np.float32))
        other = np.zeros((12, 48)) if second is None else heads[second].astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(part[1], other)


@dataclass(frozen=True)
class Odd:
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 2
    experts: int = 6
    hedas: int = 4


def model_of(*axes):
    specs = [weight(Odd(), a.rstrip("+"), f"w{i}", together=a.endswith("+")) for i, a in enumerate(axes)]
    return Model("odd", Odd, lambda config: specs, lambda *a: None, lambda *a: None)


@pytest.mark.parametrize(
    ("mesh", "axes", "message"),
    [
        ("4", ("heads", "kv_heads", "hedas head_dim"), "w2: no rule divides axis 'hedas'; known are heads, kv_heads"),
        ("4", ("head_dim",), "odd has no weights with the axes heads and kv_heads"),
        ("model=2,expert=2", ("heads", "kv_heads"), "odd has no experts to divide; give mesh model=4"),
        ("model=1,expert=4", ("heads", "kv_heads", "experts"), "6 experts cannot be divided over expert=4"),
        (
            "3",
            ("heads head_dim+", "kv_heads"),
            "w0: a norm over all heads together, so none can be added to divide the 4",
        ),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(mesh, axes, message):
    with pytest.raises(ConfigError, match=message):
        Partition(meshes(MeshShape.parse(mesh), jax.local_devices())[0], model_of(*axes), Odd())


def test_a_norm_over_all_heads_bears_copies_of_each():
    mesh = meshes(MeshShape(model=4), jax.local_devices())[0]
    config = Odd(kv_heads=2)
    specs = [weight(config, axes, "w", together=True) for axes in ("heads head_dim", "kv_heads head_dim")]
    partition = Partition(mesh, Model("even", Odd, lambda config: specs, lambda *a: None, lambda *a: None), config)
    assert (partition.config.heads, partition.config.kv_heads) == (4, 4)


def test_experts_are_divided_in_groups_and_all_else_over_every_device():
    mesh = meshes(MeshShape.parse("model=2,expert=3"), jax.local_devices())[0]
    partition = Partition(mesh, model_of("heads", "kv_heads", "experts head_dim"), Odd())
    leaf = partition.leaf(ParamSpec(("experts", "head_dim"), (6, 2), "w"), np.float32)
    assert leaf.shape == (6, 2) and leaf.sharding.shard_shape(leaf.shape) == (2, 2)
    assert partition.config.kv_heads == 6 and partition.config.experts == 6


@pytest.mark.parametrize(
    ("model", "device", "message"),
    [
        ({}, {"attention": "cpu"}, "attention='cpu' runs on one device, not on 4"),
        ({"quantization": "q6_k"}, {}, "quantization q6_k needs the CPU and its C\\+\\+ kernels, and one device of it"),
        ({}, {"memory_utilization": 1e-9}, r"weights of 0.00 GiB a device, float32, do not fit: 0% of its \d+"),
        ({}, {"mesh": "2x4"}, "mesh 2x4: this runs one replica only; give 1x4"),
        ({}, {"mesh": "1x16"}, "mesh 1x16 needs 16 devices, found 8; try --mesh 1x8"),
    ],
)
def test_what_a_mesh_cannot_have_is_refused_before_a_weight_is_read(model, device, message):
    options = EngineOptions(model=ModelOptions(**model), device=DeviceOptions(**{"mesh": "1x4"} | device))
    said = []
    with pytest.raises(ConfigError, match=message):
        Runner(options, GOLDENS / "llama3", EngineMetrics("test"), said.append)
    assert not [line for line in said if "weights" in line]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    models.ARCHITECTURES["ToyForCausalLM"] = "toy_model"
    yield write_checkpoint(tmp_path_factory.mktemp("toy"))
    del models.ARCHITECTURES["ToyForCausalLM"]


@pytest.fixture(scope="module")
def three(toy):
    """Three replicas of one device each."""
    with running(toy, "3x1", length=64) as engine:
        one_shape_only(engine)
        yield engine


def test_each_replica_computes_on_its_own_device_and_counts_under_its_own_label(three):
    results = three.run({str(i): request(str(i), [i + 1], max_tokens=4) for i in range(6)})
    assert [results[str(i), 0].tokens for i in range(6)] == [[i + 2, i + 3, i + 4, i + 5] for i in range(6)]
    assert [one.runner._state.cache.devices() for one in engines(three)] == [{d} for d in jax.local_devices()[:3]]
    text = three.thread.metrics_text().decode()
    for i in range(3):
        assert f'vllm:generation_tokens_total{{engine="{i}",model_name="test"}} 8.0' in text


def test_an_abort_reaches_the_replica_that_has_the_request(three):
    for name in ("a", "b", "c"):
        three.thread.submit(request(name, [1, 2], max_tokens=None, ignore_eos=True))
    for name in ("a", "b", "c", "nobody"):
        three.thread.abort(name)
    assert three.one([5], max_tokens=3).tokens == [6, 7, 8]
    for _ in range(1000):
        held = [one.scheduler.pages.usage for one in engines(three) if not one.scheduler.idle]
        if not held:
            break
        time.sleep(0.01)
    assert not held, "an aborted request goes on"


def test_what_is_refused_is_no_load(three):
    for i in range(20):
        assert three.one([toy_model.VOCAB + i], max_tokens=3).error == "InvalidParameter"
    loads = three.engine._router._sequences, three.engine._router._tokens
    assert loads == ([0, 0, 0], [0, 0, 0])


def test_a_replica_that_dies_ends_the_engine(toy, monkeypatch):
    def broken(plan):
        raise RuntimeError("the device is gone")

    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))
    with running(toy, "2x1", length=64) as engine:
        one_shape_only(engine)
        engines(engine)[1].runner.launch = broken
        for name in ("a", "b"):
            engine.thread.submit(request(name, [1, 2], max_tokens=None, ignore_eos=True))
        engine.thread._thread.join(60)
        assert engine.thread.status.state is EngineState.DEAD and "the device is gone" in engine.thread.error.message
    assert [str(error) for error in seen] == ["the device is gone"]
    ended = {}
    while not engine._deltas.empty():
        ended |= {d.request_id: d.finish for d in engine._deltas.get() if d.finish}
    assert ended.keys() == {"a", "b"} and ended["b"] == "error"


def test_programs_of_meshes_are_not_taken_for_each_other(tmp_path):
    cache, made = CompileCache(str(tmp_path), whole=True), []

    def double(x):
        made.append(1)
        return x * 2

    def program(devices, spec):
        sharding = NamedSharding(jax.sharding.Mesh(np.array(devices), ("model",)), spec)
        shape = jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=sharding)
        return cache.get("double", double, shape, out_shardings=sharding), sharding

    d = jax.local_devices()
    cases = [(d[:2], P("model")), (d[:2], P()), (d[2:4], P("model")), (d[1::-1], P("model")), (d[:4], P("model"))]
    for times in range(2):  # compiled, then loaded
        for case in cases:
            compiled, sharding = program(*case)
            x = jax.device_put(jnp.arange(16.0).reshape(4, 4), sharding)
            y = jax.block_until_ready(compiled(x))
            np.testing.assert_array_equal(y, np.arange(16.0).reshape(4, 4) * 2)
            assert y.sharding == sharding
        assert len(made) == len(cases), times


def test_what_was_compiled_ahead_is_what_every_replica_starts_with(family, tmp_path):
    """From config.json alone."""
    path, alone = family("llama2"), tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((path / "config.json").read_text())
    out = str(tmp_path / "out")
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "num_kv_pages": 32, "block_size": 4, "mesh": "2x2"}
    flags = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.call(["compile", str(alone), out, *flags]) == 0
    options = engine_options_of(str(path), sizes | {"warmup": "full", "compile_cache_dir": out})
    engine = open_engine(options, path, model_name="test", deliver=lambda deltas: None)
    text = engine.metrics.text().decode()
    assert len(re.findall(r'jaxserve_xla_compiles_total{.*phase="warmup".*} 0.0', text)) == 2
    loads = [float(n) for n in re.findall(r'jaxserve_xla_loads_total{.*phase="warmup".*} (\S+)', text)]
    assert sum(loads) == len(list((tmp_path / "out" / "programs").iterdir())) and loads[0] == loads[1] > 3


def test_every_replica_gets_other_weights_divided_as_the_first_ones(family, tmp_path):
    """From a checkpoint, and from a tree."""
    path = family("llama2")
    tensors = {name: w[..., ::-1].copy() for name, w in load_file(path / "model.safetensors").items()}
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    want, _ = answers(tmp_path, None, greedy(4))
    model, config = find_model(json.loads((path / "config.json").read_text()))
    specs = model.param_specs(config)

    def array(spec):
        return tensors[spec.name].reshape(spec.shape)

    tree = jax.tree.map(array, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    with running(path, "2x3") as engine:
        one_shape_only(engine)
        before = engine.run({r.id: r for r in greedy(4)})
        assert engine.thread.update(Update(path=str(tmp_path))).info.weights_version == 1
        assert_same(engine.run({r.id: r for r in greedy(4)}), want)
        with pytest.raises(CheckpointError, match="missing tensor"):
            engine.thread.update(Update(), {})
        assert engine.thread.update(Update(path=str(path))).info.weights_version == 2
        assert_same(engine.run({r.id: r for r in greedy(4)}), before)
        for given in (tree, jax.tree.map(jnp.asarray, tree)):
            engine.thread.update(Update(), given)
            assert_same(engine.run({r.id: r for r in greedy(4)}), want)
        assert engine.thread.info.weights_version == 4
        text = engine.thread.metrics_text().decode()
        assert len(re.findall(r"jaxserve_weights_version{.*} 4.0", text)) == 2
        assert len(re.findall(r'jaxserve_xla_(?:compiles|loads)_total{.*phase="serving".*} 0.0', text)) == 4


ALONE_ONLY = {
    "has a size of its own": (
        'linear(h, p["q"], out=2)',
        'linear(h, p["q"], out=2).reshape(-1, 4, 16)',
        ["heads from 4 to 6", "mine.py:121: TypeError: cannot reshape", "take sizes from the config"],
    ),
    "takes the mean of what is divided": (
        'linear(h, p["up"])',
        '(lambda u: u - u.mean(axis=-1, keepdims=True))(linear(h, p["up"]))',
        ["ffn from 128 to 129", "the logits differ", "it is axis ffn", "with zeros to 129", "layers.0.mlp.up_proj"],
    ),
    "has its heads in another order": (
        "attend(layer, q, k, v, cache)",
        "attend(layer, q[:, ::-1], k, v, cache)",
        ["the logits differ", "it is axis heads or kv_heads", "side by side", "self_attn.q_proj"],
    ),
}


@pytest.mark.parametrize("bug", ALONE_ONLY)
def test_what_is_right_on_one_device_only_is_named(bug, tmp_path):
    old, new, words = ALONE_ONLY[bug]
    text = (Path(models.__file__).parent.parent / "embedded" / "new_model.py").read_text()
    assert old in text
    (tmp_path / "mine.py").write_text(
        text.replace(old, new).replace('"num_hidden_layers": 2', '"num_hidden_layers": 1')
    )
    model = load_model_code(str(tmp_path / "mine.py"))
    finding = check_divided(model, model.config_from_hf(model.example))
    assert finding.outcome == "FAIL"
    for word in words:
        assert word in finding.detail


def test_a_model_whose_axes_have_no_rule_is_noted():
    model = load_model_code(str(GOLDENS.parent.parent / "examples" / "gpt2_nnx.py"))
    finding = check_divided(model, model.config_from_hf(model.example))
    assert finding.outcome == "note" and "no rule divides axis 'axis0'" in finding.detail
