"""GGUF files as checkpoints: names, values and config that a model file finds in them, and what is refused."""

import math
from pathlib import Path

import gguf_files
import ml_dtypes
import numpy as np
import pytest
from gguf_files import file_bytes, saved

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.formats import FORMATS, dequantise
from jaxserve.layers import Rope
from jaxserve.models import find_model
from jaxserve.weights import open_checkpoint
from jaxserve.weights.gguf import ARCHITECTURES, GgufCheckpoint, halves_from_pairs
from jaxserve.weights.load import splits

# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "qwen3moe"])  # which is below
def test_a_model_file_finds_its_tensors_and_nothing_else(tmp_path, architecture, tied, kind) -> None:
    tensors = gguf_files.model_tensors(architecture, tied=tied)
    keys = {"logit_scale": 1.0} if architecture == "granite" else {}
    path = gguf_files.write_model(tmp_path / "m.gguf", architecture, tensors=tensors, metadata=keys, kind=kind)
    checkpoint = open_checkpoint(path)
    model, config = find_model(checkpoint.config)
    assert model.name == architecture
    assert config.tied is tied and config.head_dim == 16 and config.eps == 1e-5 and config.max_positions == 64
    import jax

    specs = jax.tree.leaves(model.param_specs(config), is_leaf=lambda leaf: hasattr(leaf, "axes"))
    assert {spec.name for spec in specs} == checkpoint.names()
    for spec in specs:
        shape = checkpoint.shape(spec.name)
        assert splits(shape if spec.rows is None else (spec.rows[1] - spec.rows[0], *shape[1:]), spec.shape)
        read = checkpoint.read(spec.name)
        assert read.shape == checkpoint.shape(spec.name) and read.dtype == checkpoint.dtype(spec.name) == np.float32
        assert (checkpoint.blocks(spec.name) is not None) == (kind == "Q8_0" and read.ndim == 2)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize(("architecture", "name"), [("llama", "mixtral"), ("qwen3moe", "qwen3_moe")])
def test_a_stack_of_experts_is_as_many_tensors(tmp_path, architecture, name, kind) -> None:
    import gguf
    import jax

    tensors = gguf_files.model_tensors(architecture, experts=True)
    path = gguf_files.write_model(
        tmp_path / "m.gguf", architecture, tensors=tensors, metadata=gguf_files.EXPERTS, kind=kind
    )
    checkpoint = open_checkpoint(path)
    model, config = find_model(checkpoint.config)
    assert model.name == name and (config.experts, config.experts_used) == (3, 2)
    specs = jax.tree.leaves(model.param_specs(config), is_leaf=lambda leaf: hasattr(leaf, "axes"))
    names = [n for spec in specs for n in spec.names]
    assert set(names) == checkpoint.names()
    # Of qwen3moe's experts the file does not say the width: it is that of the layer, shared out.
    wrong = {n for s in specs for n in s.names if not splits(checkpoint.shape(n), s.tensor_shape)}
    assert all(".experts." in n for n in wrong) and bool(wrong) == (architecture == "qwen3moe")
    down = {"mixtral": "block_sparse_moe.experts.2.w2", "qwen3_moe": "mlp.experts.2.down_proj"}[name]
    down, stack = f"model.layers.1.{down}.weight", tensors["blk.1.ffn_down_exps.weight"]
    packed = gguf.quants.quantize(stack, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(
        checkpoint.read(down), gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])[2]
    )
    if kind != "F32":
        np.testing.assert_array_equal(checkpoint.blocks(down).rows, packed[2])
    checkpoint.release(down)
    assert sum(checkpoint.nbytes(n) for n in names) == sum(t.nbytes for t in checkpoint.file.tensors.values())
    if architecture == "qwen3moe":
        metadata = gguf_files.EXPERTS | {"expert_feed_forward_length": gguf_files.FFN}
        path = gguf_files.write_model(tmp_path / "n.gguf", architecture, tensors=tensors, metadata=metadata)
        assert find_model(open_checkpoint(path).config)[1].expert_ffn == gguf_files.FFN


def test_experts_that_are_no_stack_are_named(tmp_path) -> None:
    tensors = gguf_files.model_tensors(experts=True)
    tensors["blk.0.ffn_up_exps.weight"] = tensors["blk.0.ffn_up_exps.weight"][0]
    path = gguf_files.write_model(tmp_path / "m.gguf", tensors=tensors, metadata=gguf_files.EXPERTS)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up_exps\.weight is \[64, 32\], not a stack of matrices"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_only_llama_has_rows_to_put_back(tmp_path, kind) -> None:
    import gguf

    for architecture in ("llama", "qwen3"):
        tensors = gguf_files.model_tensors(architecture)
        bias = np.arange(32, dtype=np.float32)
        tensors |= {"blk.0.attn_q.bias": bias}
        path = gguf_files.write_model(tmp_path / "m.gguf", architecture, tensors=tensors, kind=kind)
        checkpoint = GgufCheckpoint(path)
        packed = gguf.quants.quantize(tensors["blk.1.attn_q.weight"], gguf.GGMLQuantizationType[kind])
        stored = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
        # Head by head the even rows, then the odd ones.
        head = [*range(0, 16, 2), *range(1, 16, 2)]
        order = [*head, *(16 + i for i in head)] if architecture == "llama" else list(range(32))
        name = "model.layers.1.self_attn.q_proj.weight"
        np.testing.assert_allclose(checkpoint.read(name), stored[order], rtol=1e-6)
        np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.bias"), bias[order])
        if kind != "F32":
            stored = checkpoint.blocks(name)
            found, blocks = stored.format, stored.rows
            assert found is FORMATS[kind]
            np.testing.assert_array_equal(blocks, packed[order])
    order = halves_from_pairs(3, 6)
    assert order[:6].tolist() == [0, 2, 4, 1, 3, 5]
    assert np.argsort(order)[order].tolist() == list(range(18))


def test_dense_types_are_read_as_they_are(tmp_path) -> None:
    for kind, dtype in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        checkpoint = open_checkpoint(gguf_files.write_model(tmp_path / "m.gguf", kind=kind))
        read = checkpoint.read("model.layers.0.mlp.up_proj.weight")
        assert read.dtype == checkpoint.dtype("model.layers.0.mlp.up_proj.weight") == dtype
        assert not read.flags.writeable and checkpoint.blocks("model.layers.0.mlp.up_proj.weight") is None
        np.testing.assert_array_equal(read, gguf_files.model_tensors()["blk.0.ffn_up.weight"].astype(dtype))


def test_large_tensors_are_dequantised_in_pieces(tmp_path, monkeypatch) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf", kind="Q8_0")
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    whole = [open_checkpoint(path).read(name) for name in names]
    monkeypatch.setattr("jaxserve.weights.gguf._CHUNK", 5 * gguf_files.WIDTH)  # rows that do not fill the last piece
    for name, wanted in zip(names, whole, strict=True):
        np.testing.assert_array_equal(open_checkpoint(path).read(name), wanted)


def test_tensors_of_no_model_keep_their_names(tmp_path) -> None:
    extra = {name: np.ones(4, np.float32) for name in ("blk.0.attn_sinks", "blk.00.attn_q.weight", "rope_freqs.weight")}
    tensors = gguf_files.model_tensors("qwen2") | extra
    assert extra.keys() < open_checkpoint(gguf_files.write_model(tmp_path / "m.gguf", "qwen2", tensors=tensors)).names()
    tensors |= {"model.norm.weight": np.ones(32, np.float32)}
    path = gguf_files.write_model(tmp_path / "m.gguf", "qwen2", tensors=tensors)
    with pytest.raises(CheckpointError, match=r"'output_norm.weight' and 'model.norm.weight' are both model\.norm"):
        open_checkpoint(path)


def test_rows_that_are_not_whole_heads_are_named(tmp_path) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf", metadata={"attention.head_count_kv": 2})
    checkpoint = open_checkpoint(path)
    for use in (checkpoint.read, checkpoint.blocks):
        with pytest.raises(CheckpointError, match=r"blk\.0\.attn_k\.weight has 16 rows for 2 heads of 16"):
            use("model.layers.0.self_attn.k_proj.weight")


def config_of(tmp_path: Path, architecture: str = "llama", tensors=None, **metadata) -> dict:
    metadata = {key.replace("__", "."): value for key, value in metadata.items()}
    path = gguf_files.write_model(tmp_path / "m.gguf", architecture, tensors=tensors, metadata=metadata)
    return open_checkpoint(path).config


def test_what_a_file_does_not_say(tmp_path) -> None:
    keys = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base")
    config = config_of(tmp_path, **dict.fromkeys([*keys, "rope.dimension_count"]))
    assert config["num_key_value_heads"] == 2 and config["head_dim"] == 16 and config["rope_theta"] == 10_000
    assert config["rope_scaling"] is None and not config["attention_bias"]


def test_what_is_off_or_idle_changes_nothing(tmp_path) -> None:
    idle = {"expert_count": 0, "vocab_size": 12, "attention.causal": True, "rope.scaling.type": "none", "x.y": False}
    each = {"feed_forward_length": [64, 64], "attention.head_count_kv": [1, 1], "attention.sliding_window": 0}
    assert config_of(tmp_path, **idle, **each) == config_of(tmp_path)


def test_biases_by_their_presence(tmp_path) -> None:
    tensors = gguf_files.model_tensors() | {"blk.0.attn_output.bias": np.ones(32, np.float32)}
    config = config_of(tmp_path, tensors=tensors)
    assert config["attention_bias"] and not config["mlp_bias"]
    assert config_of(tmp_path, tensors=tensors | {"blk.0.ffn_down.bias": np.ones(32, np.float32)})["mlp_bias"]


def test_a_sliding_window_makes_it_mistral(tmp_path) -> None:
    model, config = find_model(config_of(tmp_path, attention__sliding_window=16))
    assert model.name == "mistral" and config.window == 16


def test_linear_rope_scaling(tmp_path) -> None:
    spellings = (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        {"rope.scaling.factor": 4.0},
        {"rope.scale_linear": 4.0},
    )
    for keys in spellings:
        assert Rope.from_hf(config_of(tmp_path, "qwen2", **keys)) == Rope(10_000.0, "linear", 4.0)
    for keys in ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope.scaling.factor": 1.0}):
        assert config_of(tmp_path, "qwen2", **keys)["rope_scaling"] is None


def divisors(factor: float, theta: float, head_dim: int, original: int = 8192) -> np.ndarray:
    """Llama 3.1's scaling as its authors give it, one frequency after the other."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi / (1.0 / theta ** (i / head_dim))
        if wavelength < original / 4:
            found.append(1.0)
        elif wavelength > original / 1:
            found.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_rope_scaling_is_recovered(tmp_path, factor) -> None:
    wanted = divisors(factor, 500_000.0, 16)
    assert len(set(wanted.tolist())) > 2  # some are blended
    tensors = gguf_files.model_tensors() | {"rope_freqs.weight": wanted}
    path = gguf_files.write_model(tmp_path / "m.gguf", tensors=tensors, metadata={"rope.freq_base": 500_000.0})
    checkpoint = open_checkpoint(path)
    assert "rope_freqs.weight" not in checkpoint.names()
    rope = find_model(checkpoint.config)[1].rope
    assert rope == Rope(500_000.0, "llama3", factor, 1.0, 4.0, 8192)
    np.testing.assert_allclose(rope.frequencies(16), Rope(500_000.0).frequencies(16) / wanted, rtol=1e-6)


def test_other_rope_factors_are_refused_and_ones_do_nothing(tmp_path) -> None:
    def config(values: np.ndarray, **more) -> dict:
        tensors = gguf_files.model_tensors() | {"rope_freqs.weight": np.asarray(values, np.float32)}
        return config_of(tmp_path, tensors=tensors, rope__freq_base=500_000.0, **more)

    assert config(np.ones(8))["rope_scaling"] is None
    for wrong in (divisors(8, 500_000.0, 16, original=4096), divisors(8, 1e6, 16), np.zeros(8), np.full(8, np.nan)):
        with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not Llama 3's rope scaling"):
            config(wrong)
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is F32 \[7\], not F32 \[8\]"):
        config(np.ones(7))
    with pytest.raises(ConfigError, match="both rope_freqs"):
        config(np.ones(8), rope__scaling__factor=2.0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"expert_count": 8}, r"lacks llama\.expert_used_count; served is one whole number above 0"),
        ({"expert_shared_count": 1}, r"asks for what is not computed here: llama\.expert_shared_count = 1"),
        ({"logit_scale": 0.5, "x": "y"}, r"not computed here: llama\.logit_scale = 0\.5, llama\.x = 'y'"),
        ({"rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type is 'yarn'; served is none or linear"),
        ({"rope.scaling.attn_factor": 2.0}, r"llama\.rope\.scaling\.attn_factor is 2\.0; served is 1\.0"),
        ({"rope.scaling.factor": -1.0}, r"llama\.rope\.scaling\.factor is -1\.0; served is a number above 0"),
        ({"rope.dimension_count": 8}, r"llama\.rope\.dimension_count is 8; served is head_dim 16"),
        ({"attention.value_length": 8}, r"llama\.attention\.value_length is 8; served is head_dim 16"),
        ({"attention.causal": False}, r"llama\.attention\.causal is False; served is True"),
        (
            {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5},
            r"lacks llama\.attention\.layer_norm_rms_epsilon",
        ),
        ({"attention.layer_norm_rms_epsilon": math.nan}, r"layer_norm_rms_epsilon is nan; served is a number above 0"),
        ({"block_count": None}, r"lacks llama\.block_count; served is one whole number above 0"),
        ({"block_count": 2**32 - 1}, r"llama\.block_count is 4294967295, the tensors are 21"),
        ({"attention.head_count": 0}, r"llama\.attention\.head_count is 0; served is one whole number above 0"),
        ({"attention.head_count_kv": [1, 2]}, r"llama\.attention\.head_count_kv is array\(\[1, 2\], .*one whole"),
        ({"attention.sliding_window": [4, 4, 0]}, r"llama\.attention\.sliding_window is array"),
        ({"context_length": "64"}, r"llama\.context_length is '64'"),
        (
            {"attention.key_length": 15, "attention.value_length": 15, "rope.dimension_count": 15},
            r"llama\.attention\.key_length is 15; served is an even one",
        ),
        ({"general.type": "adapter"}, "a GGUF of type 'adapter', not a model"),
    ],
)
def test_what_is_not_served_is_named(tmp_path, metadata, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, **metadata)


def test_an_architecture_that_is_not_served_is_named(tmp_path) -> None:
    with pytest.raises(
        ConfigError, match="architecture 'gemma' is not served; served are llama, qwen2, qwen3, qwen3moe"
    ):
        config_of(tmp_path, "gemma")
    with pytest.raises(ConfigError, match="architecture None is not served"):
        open_checkpoint(saved(tmp_path / "m.gguf", file_bytes()))
    with pytest.raises(ConfigError, match=r"qwen2\.attention\.sliding_window = 16"):
        config_of(tmp_path, "qwen2", attention__sliding_window=16)
    with pytest.raises(ConfigError, match=r"holds no matrix token_embd\.weight"):
        config_of(tmp_path, tensors={"x": np.ones(3, np.float32)})


# --- against models converted elsewhere -----------------------------------------------------------------------------

MODELS = ("stories260K", "babyllama361")
ERRORS = {"F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01, "Q5_0": 0.06, "Q4_0": 0.12, "Q4_1": 0.12, "IQ4_NL": 0.12}
"""Relative error of the whole tensor that each type may have."""


@pytest.mark.parametrize("model", MODELS)
def test_a_converted_model_is_the_one_it_was_made_of(shared_data, model) -> None:
    path = shared_data / "models" / model
    if not (path / f"{model}-f32.gguf").is_file():
        pytest.skip(f"no GGUF file of {model} in the reference data")
    source, checkpoint = open_checkpoint(path), open_checkpoint(path / f"{model}-f32.gguf")
    assert checkpoint.names() == source.names()
    for name in source.names():
        assert checkpoint.shape(name) == source.shape(name)
        np.testing.assert_array_equal(checkpoint.read(name), source.read(name))
    assert find_model(checkpoint.config)[1] == find_model(source.config)[1]


@pytest.mark.parametrize("model", MODELS)
def test_a_quantised_model_is_near_its_source(shared_data, model) -> None:
    path = shared_data / "models" / model
    if not (path / f"{model}-Q8_0.gguf").is_file():
        pytest.skip(f"no GGUF file of {model} in the reference data")
    source = open_checkpoint(path)
    for file in path.glob("*-*.gguf"):
        kind = file.stem.rsplit("-", 1)[1]
        if kind == "f32":
            continue
        checkpoint = open_checkpoint(file)
        assert checkpoint.names() == source.names()
        kinds = set()
        for name in source.names():
            wanted, read = source.read(name).astype(np.float32), checkpoint.read(name).astype(np.float32)
            assert np.linalg.norm(read - wanted) <= ERRORS[kind] * np.linalg.norm(wanted), (kind, name)
            if (blocks := checkpoint.blocks(name)) is not None:
                kinds.add(blocks.format.name)
                np.testing.assert_array_equal(dequantise(blocks.format, blocks.rows), read)
        assert kind in kinds or kind in ("F16", "BF16")
