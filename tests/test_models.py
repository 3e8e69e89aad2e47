"""Every model file against transformers in float32: committed checkpoints, both spellings of config.json."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import attention
from jaxserve.config import DeviceOptions, ModelOptions
from jaxserve.errors import ConfigError
from jaxserve.loading import load_model
from jaxserve.models import ARCHITECTURES, find_model
from jaxserve.page_groups import PageGroups
from jaxserve.random_weights import write_checkpoint
from jaxserve.spec import ParamSpec
from jaxserve.weights import open_checkpoint
from jaxserve.weights.load import load_params

GOLDENS = sorted(p.parent for p in Path(__file__).parent.glob("goldens/*/config.json"))


def load(path, config_name="config.json"):
    model, config = find_model(json.loads((path / config_name).read_text()))
    params = load_params(
        model, config, open_checkpoint(path), dtype=np.float32, device_put=lambda a, spec: jnp.asarray(a)
    )
    return model, config, params


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.name)
def test_logits_equal_transformers(path):
    golden = np.load(path / "golden.npz")
    model, config, params = load(path)

    @jax.jit
    def run(params, tokens):
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        hidden, _ = model.forward(params, config, tokens, positions, jnp.zeros(()), attention.dense)
        return model.logits(params, config, hidden)

    for tokens, want in zip(golden["tokens"], golden["logits"], strict=True):
        got = np.asarray(run(params, jnp.asarray(tokens)))
        assert got.dtype == np.float32
        assert np.abs(got - want).max() <= 2e-4 * np.abs(want).max()


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.name)
def test_both_spellings_of_the_config_mean_the_same(path):
    new, classic = (json.loads((path / n).read_text()) for n in ("config.json", "config.classic.json"))
    assert find_model(new)[1] == find_model(classic)[1]


def paged(path, chunks, page=8):
    """Logits of every position of the golden's first prompt, computed in `chunks` through a paged cache."""
    golden = np.load(path / "golden.npz")
    model, config, params = load(path)
    tokens = golden["tokens"][0]
    spec = model.cache_spec(config)
    pages = -(-len(tokens) // page)
    cache = jnp.full((spec.layers * (pages + 1), page, spec.row), jnp.nan)
    table = jnp.asarray(np.arange(pages, 0, -1, dtype=np.int32)[None])  # pages in an order of their own
    kernel = attention.choose("reference", "cpu")[2]

    @jax.jit
    def step(params, tokens, positions, cache, kv_lens, cu):
        decode = jnp.where(cu[1] == 1, 1, 0)
        attend = attention.bind(
            kernel,
            PageGroups.single(spec.layers),
            [kv_lens],
            [table],
            cu,
            jnp.stack([decode, decode, jnp.ones_like(decode)]),
        )
        hidden, cache = model.forward(params, config, tokens, positions, cache, attend)
        return model.logits(params, config, hidden), cache

    out, done = [], 0
    for size in filter(None, chunks):
        padded = max(8, 1 << (size - 1).bit_length())  # as in the buckets of a step; each size is a program
        positions = np.arange(done, done + padded, dtype=np.int32)
        new = np.zeros(padded, np.int32)
        new[:size] = tokens[done : done + size]
        done += size
        logits, cache = step(
            params, new, positions, cache, np.array([done], np.int32), np.array([0, size], np.int32)
        )  # fmt: skip
        out.append(np.asarray(logits)[:size])
    assert done == len(tokens)
    return np.concatenate(out), golden["logits"][0]


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.name)
def test_chunked_is_whole_and_both_equal_transformers(path):
    length = np.load(path / "golden.npz")["tokens"].shape[1]
    whole, want = paged(path, [length])
    assert np.abs(whole - want).max() <= 2e-4 * np.abs(want).max()
    chunked, _ = paged(path, [7, 7, 1, 1, 1, 1, 1, 1, *[5] * ((length - 20) // 5), (length - 20) % 5])
    assert np.abs(chunked - whole).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_axes_are_sized_by_the_config(name):
    path = next(p for p in GOLDENS if name in (p / "config.json").read_text())
    model, config = find_model(json.loads((path / "config.json").read_text()))
    specs = jax.tree.leaves(model.param_specs(config), is_leaf=lambda s: isinstance(s, ParamSpec))
    assert len({(s.name, s.rows) for s in specs}) == len(specs)
    for spec in specs:
        assert spec.shape == tuple(getattr(config, axis) for axis in spec.axes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPTBigCodeForCausalLM"]},
            "GPTBigCodeForCausalLM is not served; served are DeepseekV2ForCausalLM, Gemma2",
        ),
        ({"architectures": []}, "none in config.json"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "unquantised"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not served"),
        ({"hidden_size": None}, "incomplete"),
    ],
)
def test_what_is_not_served_is_refused_by_name(change, message):
    hf = json.loads((GOLDENS[0].parent / "llama2" / "config.json").read_text())
    hf.pop("head_dim", None)
    with pytest.raises(ConfigError, match=message):
        find_model(hf | change)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping=0.0; a soft cap must be above 0"),
        ({"query_pre_attn_scalar": 0}, "config.json is incomplete for Gemma"),
        ({"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\]; served are \d of sliding"),
        ({"layer_types": ["chunked_attention"] * 7, "num_hidden_layers": 7}, "chunked_attention"),
    ],
)
def test_what_gemma_is_not_served_with(family, change, message):
    hf = json.loads((GOLDENS[0].parent / family / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        find_model(hf | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"rope_parameters": {"rope_type": "default"}}, "must hold full_attention and sliding_attention"),
    ],
)
def test_what_gemma3_is_not_served_with(change, message):
    hf = json.loads((GOLDENS[0].parent / "gemma3" / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        find_model(hf | change)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("phi3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope scaling 'yarn' of phi3 is not served",
        ),
        (
            "phi3",
            {"partial_rotary_factor": 0.2, "rope_parameters": None},
            "partial_rotary_factor 0.2 of head_dim 16 is 3",
        ),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "incomplete for Phi3ForCausalLM: KeyError.'short_fac"),
        ("olmo2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("granite", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]; served are 4 or more of 0 and 1"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, r"no_rope_layers=\[1, 0, 2, 1\]"),
        ("smollm3", {"layer_types": ["chunked_attention"] * 4}, "layer_types=.'chunked_attention'"),
        ("smollm3", {"sliding_window": None}, "sliding_attention in layer_types and no sliding_window"),
        ("smollm3", {"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn' is not served"),
    ],
)
def test_what_other_families_are_not_served_with(family, change, message):
    hf = json.loads((GOLDENS[0].parent / family / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        find_model(hf | change)


@pytest.mark.parametrize("key", ["short_factor", "long_factor"])
@pytest.mark.parametrize("divisors", [[1.0] * 5, [1.0] * 5 + [0.0]])
def test_lists_of_phi3_that_fit_no_frequencies(key, divisors):
    hf = json.loads((GOLDENS[0].parent / "phi3" / "config.json").read_text())
    hf["rope_parameters"][key] = divisors
    with pytest.raises(ConfigError, match=rf"{key}=.*; served are 6 numbers above 0"):
        find_model(hf)


def test_the_longest_sequence_decides_which_list_of_phi3_counts():
    """As in transformers, where it is the sequence at hand: of one that is longer, the keys are computed anew."""
    _, config = find_model(json.loads((GOLDENS[0].parent / "phi3_long" / "config.json").read_text()))
    assert (config.max_positions, config.original_positions) == (256, 32)
    long, short = (replace(config, max_positions=n).rope_in_use for n in (33, 32))
    assert long.divisors[-1] == 9.0 and short.divisors[-1] == 3.0
    assert long.magnitude == short.magnitude == pytest.approx((1 + np.log(8) / np.log(32)) ** 0.5)


def test_max_model_len_is_the_longest_sequence():
    def loaded(length):
        options = ModelOptions(max_model_len=length), DeviceOptions(attention="reference", compile_cache_dir="")
        return load_model(*options, GOLDENS[0].parent / "phi3_long", lambda message: None).config

    assert loaded(None).rope_in_use.divisors == loaded(33).rope_in_use.divisors != loaded(32).rope_in_use.divisors


def test_weights_that_share_a_tensor_are_drawn_apart_and_written_together(tmp_path):
    hf = json.loads((GOLDENS[0].parent / "phi3" / "config.json").read_text()) | {"vocab_size": 2048}
    count = write_checkpoint(find_model(hf)[0], hf, tmp_path / "m")
    _, _, params = load(tmp_path / "m")
    assert count == sum(leaf.size for leaf in jax.tree.leaves(params))
    block = params["blocks"][1]
    assert block["gate"].shape == block["up"].shape and not np.array_equal(block["gate"], block["up"])
