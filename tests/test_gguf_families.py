"""Phi-3, OLMo 2, Granite and SmolLM3 as GGUF: llama.cpp's figures, what comes back, and what there is no word for."""

import json
from dataclasses import replace
from pathlib import Path

import family_files
import gguf_files
import numpy as np
import pytest
from test_gguf_blocks import scored

from jaxserve import cli, native, quant
from jaxserve.errors import ConfigError
from jaxserve.formats import FORMATS
from jaxserve.layers import Rope
from jaxserve.models import find_model
from jaxserve.tokenizer import load_tokenizer
from jaxserve.weights import open_checkpoint
from jaxserve.weights.mixes import MIXES, choose

GOLDENS = Path(__file__).parent / "goldens" / "gguf_families"
CONTEXT = 512
"""Positions that llama.cpp was given."""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXSERVE_DATA", raising=False)


@pytest.mark.parametrize("name", family_files.CONFIGS)
def test_what_is_written_is_what_llama_cpp_computes_with_and_what_is_read_back(tmp_path, name):
    golden, src, file = json.loads((GOLDENS / f"{name}.json").read_text()), tmp_path / "src", tmp_path / "m.gguf"
    assert family_files.write_checkpoint(src, name) == golden["tensors_sha256"], "the golden is of others"
    assert cli.call(["quantize", str(src), str(file), "F32"]) == 0

    assert np.abs(scored(file, golden["prompts"], max_positions=CONTEXT) - np.asarray(golden["exact"])).max() < 1e-4
    tokenizer = load_tokenizer(file)
    for text, ids in zip(golden["texts"], golden["ids"], strict=True):
        if not name.startswith("phi3"):  # whose markup takes the space behind it, as in its tokenizer.json
            assert tokenizer.encode(text, add_special_tokens=False) == ids, text

    before, after = open_checkpoint(src), open_checkpoint(file)
    assert after.names() == before.names()
    for tensor in before.names():
        np.testing.assert_array_equal(after.read(tensor), before.read(tensor))
    config, wanted = find_model(after.config)[1], find_model(before.config)[1]
    if name.startswith("phi3"):  # whose magnitude is a float32 in the file
        assert config.rope.magnitude == pytest.approx(wanted.rope.magnitude) and wanted.rope.magnitude > 1.1
        ropes = {key: replace(getattr(wanted, key), magnitude=config.rope.magnitude) for key in ("rope", "long_rope")}
        wanted = replace(wanted, **ropes)
    assert config == wanted


# --- what a file says, and does not


def config_of(tmp_path: Path, architecture: str, tensors=None, **metadata):
    metadata = {key.replace("__", "."): value for key, value in metadata.items()}
    tensors = gguf_files.model_tensors(architecture) | (tensors or {})
    path = gguf_files.write_model(tmp_path / "m.gguf", architecture, tensors=tensors, metadata=metadata)
    return find_model(open_checkpoint(path).config)[1]


def lists(size: int = gguf_files.HEAD_DIM // 2) -> dict[str, np.ndarray]:
    long = np.linspace(1.0, 9.0, size, dtype=np.float32)
    return {"rope_factors_long.weight": long, "rope_factors_short.weight": np.ones(size, np.float32)}


def test_what_a_file_of_phi3_says(tmp_path):
    config = config_of(tmp_path, "phi3", attention__sliding_window=0, rope__scaling__original_context_length=16)
    assert (config.window, config.rope, config.long_rope) == (None, Rope(dims=16), Rope(dims=16))
    config = config_of(tmp_path, "phi3", attention__sliding_window=8, rope__dimension_count=12)
    assert (config.window, config.rope_in_use) == (8, Rope(dims=12))
    keys = {"rope__scaling__original_context_length": 16, "rope__scaling__attn_factor": 1.25}
    config = config_of(tmp_path, "phi3", lists(), **keys)
    assert (config.max_positions, config.original_positions) == (64, 16)
    assert config.rope_in_use.divisors == tuple(float(str(d)) for d in lists()["rope_factors_long.weight"])
    assert config.rope == Rope(kind="longrope", divisors=(1.0,) * 8, magnitude=1.25, dims=16)


def test_what_a_file_of_granite_does_not_say(tmp_path):
    config = config_of(tmp_path, "granite", logit_scale=8.0)
    found = config.embedding_multiplier, config.score_multiplier, config.residual_multiplier, config.logit_divisor
    assert found == (1.0, 0.25, 1.0, 8.0)  # 16 ** -0.5


def test_every_fourth_layer_of_smollm3_has_no_rope(tmp_path):
    small = gguf_files.model_tensors("smollm3")
    layers = {f"blk.{i}.{n[6:]}": t for i in range(8) for n, t in small.items() if n.startswith("blk.0.")}
    config = config_of(tmp_path, "smollm3", layers, block_count=8)
    assert config.rotated == (True, True, True, False) * 2


@pytest.mark.parametrize(
    ("architecture", "tensors", "metadata", "message"),
    [
        ("phi3", {}, {"rope__scaling__type": "yarn"}, r"rope\.scaling\.type is 'yarn'; served is none or longrope"),
        ("phi3", {}, {"rope__scaling__factor": 2.0}, r"not computed here: phi3\.rope\.scaling\.factor = 2\.0"),
        ("phi3", {}, {"rope__scaling__attn_factor": 1.5}, r"attn_factor is 1\.5; served is 1\.0 without rope_fac"),
        ("phi3", lists(7), {}, r"rope_factors_short\.weight is F32 \[7\], not F32 \[8\]"),
        ("phi3", {"rope_factors_long.weight": np.ones(8, np.float32)}, {}, r"rope_factors_short\.weight is missing"),
        ("olmo2", {}, {"attention__sliding_window": 8}, r"not computed here: olmo2\.attention\.sliding_window = 8"),
        ("olmo2", {}, {"rope__dimension_count": 8}, r"rope\.dimension_count is 8; served is head_dim 16"),
        ("granite", {}, {}, r"lacks granite\.logit_scale; served is a number above 0"),
        ("granite", {}, {"logit_scale": 1.0, "rope__scaling__finetuned": False}, "finetuned is False; served is True"),
        ("granite", {}, {"logit_scale": 1.0, "expert_count": 8}, r"not computed here: granite\.expert_count = 8"),
        ("smollm3", {}, {"attention__sliding_window": 8}, r"not computed here: smollm3\.attention\.sliding_window"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_named(tmp_path, architecture, tensors, metadata, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, architecture, tensors, **metadata)


def test_a_stacked_tensor_gets_the_format_of_values():
    """As from llama-quantize."""
    names = ("blk.0.attn_qkv.weight", "blk.0.ffn_up.weight", "blk.2.attn_qkv.weight", "output.weight")
    tensors = {name: (FORMATS["BF16"], (512, 256)) for name in names}
    chosen = choose(MIXES["Q4_K_M"], tensors, layers=3, sharing=1)
    assert [chosen[name].format.name for name in names] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]


# --- what GGUF has no word for


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope scaling 'linear' of phi3 is not"),
        ("phi3", {"partial_rotary_factor": 0.5}, "short_factor has 6 numbers for 8 dimensions that rotate in pairs"),
        ("phi3", {"head_dim": 32}, "head_dim=32 of phi3 cannot be written as GGUF; there it is 16"),
        ("olmo2", {"attention_bias": True}, "attention_bias=True"),
        ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ("olmo2", {"rope_scaling": {"rope_type": "llama3"}}, "rope scaling llama3 of olmo2 has no place in GGUF"),
        ("granite", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("smollm3", {"no_rope_layer_interval": 3}, "which layers of smollm3 have rope has no key in GGUF"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, "which layers of smollm3 have rope has no key in GGUF"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5}, "sliding windows of smollm3 have no key in GGUF"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias=True"),
    ],
)  # fmt: skip
def test_what_gguf_has_no_word_for(tmp_path, capsys, name, change, message):
    family_files.write_checkpoint(tmp_path / "src", name)
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps(config | change))
    assert cli.call(["quantize", str(tmp_path / "src"), str(tmp_path / "m.gguf"), "F32"]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m.gguf").exists()


def test_rows_of_quantised_tensors_reach_the_kernels(tmp_path):
    family_files.write_checkpoint(tmp_path / "src", "phi3")
    assert cli.call(["quantize", str(tmp_path / "src"), str(tmp_path / "m.gguf"), "Q8_0"]) == 0
    try:
        native.load()
    except native.BuildError as error:
        pytest.skip(f"the kernels are not there: {error}")
    prompts = [[2, *range(266, 286)]]
    dense = scored(tmp_path / "m.gguf", prompts)
    packed = scored(tmp_path / "m.gguf", prompts, pack=lambda w, spec: quant.pack(w, spec.shape, np.float32))
    assert 0 < np.abs(packed - dense).max() < 0.1  # whose products round activations to bytes
