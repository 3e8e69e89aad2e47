"""Mixture of experts: grouped products in every weight format, routing, and a whole model through the engine."""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running_engine
from safetensors.numpy import load_file, save_file
from test_models import load

from jaxserve import dry_run, native, quant
from jaxserve.config import DeviceOptions, ModelOptions
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.formats import FORMATS, Blocks, dequantise, quantise
from jaxserve.layers import moe
from jaxserve.loading import load_model
from jaxserve.models import find_model
from jaxserve.random_weights import draw
from jaxserve.weights import open_checkpoint

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = ("mixtral", "qwen3_moe")
EXPERTS, USED, WIDTH, FFN = 5, 3, 256, 32


@pytest.fixture
def kernels(compiler):
    native.load()


def stack(w, format=None):
    """w [E, N, K] as the kernels want it, and the numbers that are then multiplied."""
    rows = [w[e] if format is None else Blocks(format, quantise(format, w[e])) for e in range(len(w))]
    numbers = w if format is None else np.stack([dequantise(format, r.rows) for r in rows])
    packed = quant.stack((quant.pack(r, w.shape[1:], np.float32) for r in rows), len(w))
    return jax.tree.map(jnp.asarray, packed), numbers


def grouped(x, w, sizes):
    return np.asarray(jax.jit(quant.grouped_linear)(x, w, jnp.asarray(sizes, jnp.int32)))


@pytest.mark.parametrize("kind", ["plain", "ragged", "F32", "BF16", *(f.name for f in FORMATS.values() if f.quantised)])
def test_each_row_meets_its_own_matrix(request, kind):
    """Empty groups, groups of one and of many; the kernels' rows have the bits that `linear` gives them alone."""
    rng, sizes = np.random.default_rng(0), [1, 0, 13, 2, 0, 1]
    x = rng.normal(size=(17, WIDTH)).astype(np.float32)
    if kind == "BF16":  # to which some processors' products round rows
        x = x.astype(jnp.bfloat16).astype(np.float32)
    w = rng.normal(size=(6, 24, WIDTH)).astype(jnp.bfloat16 if kind == "BF16" else np.float32)
    which = np.repeat(np.arange(6), sizes)
    packed, numbers = jnp.asarray(w), w
    if kind in FORMATS:
        request.getfixturevalue("kernels")
        format = FORMATS[kind]
        packed, numbers = stack(w, format if format.quantised else None)
    if kind == "ragged":  # what other platforms than this one compute
        got = np.asarray(jax.jit(quant.ragged)(x, packed, jnp.asarray(sizes, jnp.int32)))
    else:
        got = grouped(x, packed, sizes)
    want = np.einsum("rk,rnk->rn", x, numbers[which].astype(np.float32))
    # Quantised weights meet x in steps of 1/127 of the largest of each 32.
    tolerance = 1e-2 if kind in FORMATS and FORMATS[kind].quantised else 1e-5
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
    if kind in FORMATS:
        for row in (0, 1, 13, 16):
            e = int(which[row])
            one = quant.Packed(packed.panels[e], packed.shape[1:], packed.outputs, packed.dtype, packed.format)
            np.testing.assert_array_equal(quant.linear(x[row : row + 1], one)[0], got[row])


def test_wrong_groups_are_an_error_and_the_next_call_works(kernels):
    x, w = np.ones((4, 256), np.float32), np.ones((3, 16, 256), np.float32)
    for packed in (stack(w)[0], stack(w, FORMATS["Q8_0"])[0]):
        for sizes in ([1, 1, 1], [5, 0, 0], [5, -1, 0], [2**31 - 1, 2**31 - 1, 6]):
            with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="sizes must be 0 or more .* the 4 rows"):
                grouped(x, packed, sizes)
        np.testing.assert_allclose(grouped(x, packed, [4, 0, 0]), 256, rtol=1e-3)
        with pytest.raises(ValueError, match="of 16 outputs was multiplied as one of 3"):
            quant.linear(x, packed)
    with pytest.raises(ValueError, match=r"a weight \[16, 256\] is no stack of matrices"):
        quant.grouped_linear(x, quant.pack(w[0], (16, 256), np.float32), jnp.asarray([4], jnp.int32))


@cache
def layer():
    rng = np.random.default_rng(1)
    shapes = {"router": (EXPERTS, WIDTH), "gate": (EXPERTS, FFN, WIDTH), "up": (EXPERTS, FFN, WIDTH)}
    shapes["down"] = (EXPERTS, WIDTH, FFN)
    return {name: rng.normal(scale=s[-1] ** -0.5, size=s).astype(np.float32) for name, s in shapes.items()}


def one_by_one(p, x, renormalise, groups=None):
    """The definition, a token and an expert after the other, in float64."""
    p, out = {name: w.astype(np.float64) for name, w in p.items()}, []
    for row in x.astype(np.float64):
        logits = p["router"] @ row
        weights = np.exp(logits) / np.exp(logits).sum()
        open_to = np.ones(len(weights), bool)
        if groups is not None:
            best = weights.reshape(groups[0], -1).max(axis=1)
            open_to = np.repeat(best >= np.sort(best)[-groups[1]], len(weights) // groups[0])
        chosen = np.argsort(-np.where(open_to, weights, -1), kind="stable")[:USED]
        if renormalise:
            weights = weights / weights[chosen].sum()
        y = np.zeros(WIDTH)
        for e in chosen:
            gate = p["gate"][e] @ row
            y += weights[e] * (p["down"][e] @ (gate / (1 + np.exp(-gate)) * (p["up"][e] @ row)))
        out.append(y)
    return np.array(out)


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_token_goes_through_its_best_experts(renormalise):
    x = np.random.default_rng(2).normal(size=(19, WIDTH)).astype(np.float32)
    got = jax.jit(lambda p, x: moe(p, x, USED, renormalise=renormalise))(layer(), x)
    want = one_by_one(layer(), x, renormalise)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    assert np.abs(want - one_by_one(layer(), x, not renormalise)).max() > 0.1


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("best", [2, 4])
def test_experts_are_chosen_in_the_best_groups(best, renormalise):
    """Of ten experts in groups of two."""
    rng = np.random.default_rng(6)
    x, p = rng.normal(size=(19, WIDTH)).astype(np.float32), dict(layer())
    for name in ("gate", "up", "down"):
        p[name] = np.concatenate([p[name], p[name] * 0.5])
    p["router"] = rng.normal(scale=WIDTH**-0.5, size=(2 * EXPERTS, WIDTH)).astype(np.float32)
    got = jax.jit(lambda p, x: moe(p, x, USED, renormalise=renormalise, groups=(EXPERTS, best)))(p, x)
    want = one_by_one(p, x, renormalise, (EXPERTS, best))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    differs = np.abs(want - one_by_one(p, x, renormalise)).max()
    assert (differs > 0.1) == (best < USED), "in three groups or more the three best experts always are"


@pytest.mark.parametrize("kind", [None, "Q8_0"])
def test_a_token_does_not_depend_on_its_neighbours(kernels, kind):
    p = {name: stack(w, kind and FORMATS[kind])[0] for name, w in layer().items() if name != "router"}
    p["router"] = jax.tree.map(jnp.asarray, quant.pack(layer()["router"], (EXPERTS, WIDTH), np.float32))
    run = jax.jit(lambda p, x: moe(p, x, USED, renormalise=False))
    x = np.random.default_rng(3).normal(size=(33, WIDTH)).astype(np.float32)
    crowd = np.asarray(run(p, x))
    for first, last in ((0, 1), (7, 9), (16, 33)):
        np.testing.assert_array_equal(run(p, x[first:last]), crowd[first:last])


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 6}, "num_local_experts=5 and num_experts_per_tok=6"),
        ("mixtral", {"num_experts_per_tok": None}, "config.json is incomplete for MixtralForCausalLM"),
        ("qwen3_moe", {"num_local_experts": 0}, "num_local_experts=0 and num_experts_per_tok=3"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "config.json is incomplete for Qwen3MoeForCausalLM"),
    ],
)
def test_experts_that_are_not_served(family, change, message):
    hf = json.loads((GOLDENS / family / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        find_model(hf | change)


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_weights_and_shapes_are_a_checkpoints(kernels, family):
    """`new-checkpoint` writes tensors of the names and shapes that are loaded, `check` traces what will be loaded."""
    path = GOLDENS / family
    model, config = find_model(json.loads((path / "config.json").read_text()))
    checkpoint = open_checkpoint(path)
    for spec in jax.tree.leaves(model.param_specs(config), is_leaf=lambda leaf: hasattr(leaf, "axes")):
        assert {checkpoint.shape(name) for name in spec.names} == {spec.stored_shape}
        assert draw(spec).shape == spec.shape
    params = load_model(ModelOptions(dtype="float32"), DeviceOptions(attention="cpu"), path, lambda said: None).params
    spec, up = model.param_specs(config)["blocks"][0]["up"], params["blocks"][0]["up"]
    traced = dry_run.packed(spec, spec.stored_shape, np.float32, np.float32)
    assert up.panels.shape == traced.panels.shape
    assert (up.shape, up.outputs, up.stacked) == (traced.shape, traced.outputs, traced.stacked)


def test_what_is_wrong_with_a_stack_is_told(tmp_path):
    """A missing expert, one of another shape, one of another type, one too many: all at once."""
    shutil.copytree(GOLDENS / "mixtral", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    at = "model.layers.1.block_sparse_moe.experts"
    weights[f"{at}.5.w1.weight"] = weights[f"{at}.0.w1.weight"]
    del weights[f"{at}.4.w2.weight"]
    weights[f"{at}.1.w3.weight"] = weights[f"{at}.1.w3.weight"][:7].copy()
    weights[f"{at}.2.w3.weight"] = weights[f"{at}.2.w3.weight"].astype(np.float16)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="4 problems") as caught:
        load(tmp_path)
    for line in (
        f"missing tensor (1): {at}.4.w2.weight",
        f"{at}.1.w3.weight is [7, 48], the model needs [40, 48]",
        f"unlike the others of its stack (1): {at}.2.w3.weight is float16",
        f"unexpected tensor (1): {at}.5.w1.weight",
    ):
        assert line in caught.value.message


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_quantised_while_they_are_loaded_and_routers_are_not(kernels, tmp_path, family):
    """Where blocks fill their rows; the weights are then those that `quantise` gives."""
    hf = json.loads((GOLDENS / family / "config.json").read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "mlp_only_layers": []}
    model, config = find_model(hf | sizes)
    specs = jax.tree.leaves(model.param_specs(config), is_leaf=lambda leaf: hasattr(leaf, "axes"))
    rng = np.random.default_rng(4)
    weights = {n: rng.normal(size=s.tensor_shape).astype(np.float32) for s in specs for n in s.names}
    weights = {n: w.reshape(w.shape[0], -1) if w.ndim == 3 and "_proj" in n else w for n, w in weights.items()}
    (tmp_path / "config.json").write_text(json.dumps(hf | sizes))
    save_file(weights, tmp_path / "model.safetensors")
    options = ModelOptions(quantization="q8_0")
    loaded = load_model(options, DeviceOptions(attention="cpu"), tmp_path, lambda said: None)
    assert loaded.kv_dtype == np.float16, "a router makes no cache of float32"
    block = loaded.params["blocks"][0]
    assert block["router"].format is None and block["q"].format == FORMATS["Q8_0"]
    for name in ("gate", "up", "down"):
        assert block[name].format == FORMATS["Q8_0"] and block[name].shape[0] == config.experts
    spec = model.param_specs(config)["blocks"][0]["down"]
    w = np.stack([weights[name] for name in spec.names])
    np.testing.assert_array_equal(block["down"].panels, stack(w, FORMATS["Q8_0"])[0].panels)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("qwen3_moe", "cpu"),
        pytest.param("qwen3_moe", "reference", marks=pytest.mark.slow),
        ("deepseek_v2", "cpu"),
    ],
)
def test_the_engine_continues_as_transformers_does(request, family, attention):
    """With prompts cut in pieces and several at once; `cpu` are the kernels, `reference` is XLA alone."""
    if attention == "cpu":
        request.getfixturevalue("kernels")
    path = GOLDENS / family
    golden = np.load(path / "golden.npz")
    with running_engine.Running(path, pages=96, budget=32, warmup="lazy", attention=attention) as engine:
        prompts = {
            str(i): running_engine.request(str(i), tokens.tolist(), max_tokens=24, ignore_eos=True, logprobs=0)
            for i, tokens in enumerate(golden["tokens"])
        }
        found = engine.run(prompts)
        for i, (ids, logprobs) in enumerate(zip(golden["greedy"], golden["greedy_logprobs"], strict=True)):
            result = found[str(i), 0]
            assert result.tokens == ids.tolist()
            assert np.abs(np.subtract([entry.logprob for entry in result.logprobs], logprobs)).max() < 1e-3
