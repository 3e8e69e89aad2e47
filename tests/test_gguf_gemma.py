"""Gemma as GGUF: what `jaxserve quantize` writes is what llama.cpp computes with, and what is read back here."""

import json
from pathlib import Path

import gemma_files
import gguf_files
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_gguf_blocks import scored

from jaxserve import cli
from jaxserve.errors import ConfigError
from jaxserve.gguf import GgufFile
from jaxserve.layers import Rope
from jaxserve.models import find_model
from jaxserve.tokenizer import load_tokenizer
from jaxserve.weights import open_checkpoint

GOLDENS = Path(__file__).parent / "goldens" / "gguf_gemma"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXSERVE_DATA", raising=False)


def quantized(tmp_path: Path, name: str, kind: str = "F32") -> tuple[Path, Path, dict]:
    """A checkpoint, the GGUF file that was made of it, and llama.cpp's golden."""
    golden = json.loads((GOLDENS / f"{name}.json").read_text())
    assert gemma_files.write_checkpoint(tmp_path / "src", name) == golden["tensors_sha256"], "the golden is of others"
    assert cli.call(["quantize", str(tmp_path / "src"), str(tmp_path / "m.gguf"), kind]) == 0
    return tmp_path / "src", tmp_path / "m.gguf", golden


@pytest.mark.parametrize("name", gemma_files.CONFIGS)
def test_log_probabilities_equal_llama_cpps(tmp_path, name):
    """To the rounding of its CPU backend, which looks GELU up by x in float16 and holds it so."""
    _, file, golden = quantized(tmp_path, name)
    assert np.abs(scored(file, golden["prompts"]) - np.asarray(golden["exact"])).max() < 3e-3


@pytest.mark.parametrize("name", gemma_files.CONFIGS)
def test_ids_equal_llama_cpps(tmp_path, name):
    for path in quantized(tmp_path, name)[:2]:
        tokenizer, golden = load_tokenizer(path), json.loads((GOLDENS / f"{name}.json").read_text())
        for text, ids in zip(golden["texts"], golden["ids"], strict=True):
            assert tokenizer.encode(text, add_special_tokens=False) == ids, text
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", gemma_files.CONFIGS)
def test_a_checkpoint_comes_back_as_it_was(tmp_path, name):
    src, file, _ = quantized(tmp_path, name)
    before, after = open_checkpoint(src), open_checkpoint(file)
    assert after.names() == before.names()
    assert find_model(after.config)[1] == find_model(before.config)[1]
    for tensor in before.names():
        if tensor.endswith("norm.weight"):  # the 1 costs them digits
            np.testing.assert_allclose(after.read(tensor), before.read(tensor), atol=1e-7)
        else:
            np.testing.assert_array_equal(after.read(tensor), before.read(tensor))
    stored = GgufFile(file).raw("output_norm.weight").view(np.float32).reshape(-1)
    np.testing.assert_array_equal(stored, before.read("model.norm.weight") + np.float32(1))


def test_norms_of_bfloat16_come_back_exactly(tmp_path):
    gemma_files.write_checkpoint(tmp_path / "src", "gemma2")
    weights = load_file(tmp_path / "src" / "model.safetensors")
    weights = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights.items()}
    save_file(weights, tmp_path / "src" / "model.safetensors")
    assert cli.call(["quantize", str(tmp_path / "src"), str(tmp_path / "m.gguf"), "BF16"]) == 0
    after = open_checkpoint(tmp_path / "m.gguf")
    name = "model.layers.1.post_feedforward_layernorm.weight"
    assert after.dtype(name) == np.float32
    np.testing.assert_array_equal(after.read(name).astype(ml_dtypes.bfloat16), weights[name])


def test_the_vocabulary_keeps_its_words_and_markup(tmp_path):
    src, file, _ = quantized(tmp_path, "gemma3")
    metadata = GgufFile(file).metadata
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (tokens[4], kinds[4]) == ("<start_of_turn>", 3) and (tokens[7], kinds[7]) == ("  ", 4)
    assert metadata["tokenizer.ggml.add_space_prefix"] is False and metadata["tokenizer.ggml.bos_token_id"] == 2
    for path in (src, file):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode("<start_of_turn>a", parse_special=True) == [2, 4, 267]
        assert 4 not in tokenizer.encode("<start_of_turn>a")


# --- what a file says, and does not


def config_of(tmp_path: Path, architecture: str, **metadata):
    metadata = {key.replace("__", "."): value for key, value in metadata.items()}
    path = gguf_files.write_model(tmp_path / "m.gguf", architecture, metadata=metadata)
    return find_model(open_checkpoint(path).config)[1]


def test_what_a_file_of_gemma2_does_not_say(tmp_path):
    config = config_of(tmp_path, "gemma2")
    assert (config.score_cap, config.logit_cap, config.windows) == (50.0, 30.0, (4096, None))
    assert config.scale == gguf_files.HEAD_DIM**-0.5
    config = config_of(tmp_path, "gemma2", attn_logit_softcapping=20.0, attention__sliding_window=8)
    assert (config.score_cap, config.windows) == (20.0, (8, None))


def test_what_a_file_of_gemma3_does_not_say(tmp_path):
    config = config_of(tmp_path, "gemma3")
    assert (config.local, config.logit_cap) == ((False, False), None)
    config = config_of(tmp_path, "gemma3", attention__sliding_window=8, rope__scaling__factor=4.0)
    assert (config.local, config.window) == ((True, True), 8)
    assert (config.rope, config.local_rope) == (Rope(10_000.0, "linear", 4.0), Rope(10_000.0))
    keys = {"attention__sliding_window": 8, "attention__sliding_window_pattern": 2, "rope__freq_base_swa": 50.0}
    config = config_of(tmp_path, "gemma3", **keys)
    assert (config.local, config.local_rope) == ((True, False), Rope(50.0))
    keys["attention__sliding_window_pattern"] = [False, True]
    assert config_of(tmp_path, "gemma3", **keys).local == (False, True)


def test_the_27b_models_scale_by_another_rule(tmp_path):
    for architecture, layers in (("gemma2", 46), ("gemma3", 62)):
        small = gguf_files.model_tensors(architecture)
        tensors = {f"blk.{i}.{n[6:]}": t for i in range(layers) for n, t in small.items() if n.startswith("blk.0.")}
        tensors |= {n: t for n, t in small.items() if not n.startswith("blk.")}
        heads = {"block_count": layers, "attention.head_count": 4}
        path = gguf_files.write_model(tmp_path / "m.gguf", architecture, tensors=tensors, metadata=heads)
        assert find_model(open_checkpoint(path).config)[1].scale == (gguf_files.WIDTH // 4) ** -0.5


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("gemma2", {"rope__freq_base_swa": 5.0}, r"gemma2\.rope\.freq_base_swa is 5\.0; served is that of all layers"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, r"not computed here: gemma3\.attn_logit_softcapping = 50\.0"),
        ("gemma3", {"attention__sliding_window_pattern": [True] * 3}, "sliding_window_pattern is .*served is .* or 2"),
        ("gemma3", {"attention__sliding_window_pattern": 0}, "sliding_window_pattern is 0; served is a number above 0"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, r"attn_logit_softcapping is 0\.0; served is a number above 0"),
    ],
)
def test_what_is_not_served_is_named(tmp_path, architecture, metadata, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, architecture, **metadata)


# --- what GGUF has no word for


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar=16 has no key in GGUF, where it is 24"),
        ("gemma2", {"attn_logit_softcapping": None}, "gemma2 without attn_logit_softcapping"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not served"),
    ],
)
def test_what_gguf_has_no_word_for(tmp_path, capsys, name, change, message):
    gemma_files.write_checkpoint(tmp_path / "src", name)
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps(config | change))
    assert cli.call(["quantize", str(tmp_path / "src"), str(tmp_path / "m.gguf"), "F32"]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m.gguf").exists()
