"""The text part of a checkpoint with a vision tower: the golden of Gemma 3, laid out as its larger models are."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models import find_model
from jaxserve.weights import open_checkpoint
from jaxserve.weights.convert import convert
from jaxserve.weights.gguf_export import hf_tensors, hyperparameters
from jaxserve.weights.load import load_params

ALONE = Path(__file__).parent / "goldens" / "gemma3"
VISION = ("vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.mm_soft_emb_norm.weight")


def with_vision(path: Path, *, extra: tuple[str, ...] = (), **config: object) -> Path:
    """The golden's weights under the names, and its config in the place, that Gemma3ForConditionalGeneration has."""
    path.mkdir()
    text = json.loads((ALONE / "config.json").read_text())
    del text["architectures"]
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (path / "config.json").write_text(json.dumps(outer | {"vision_config": {}, "image_token_index": 5} | config))
    weights = {f"language_model.{name}": tensor for name, tensor in load_file(ALONE / "model.safetensors").items()}
    weights |= {name: np.ones(3, np.float32) for name in (*VISION, *extra)}
    save_file(weights, path / "model.safetensors")
    return path


def loaded(path: Path):
    checkpoint = open_checkpoint(path)
    model, config = find_model(checkpoint.config)
    return load_params(model, config, checkpoint, dtype=np.float32, device_put=lambda a, spec: a)


def test_it_is_the_text_model(tmp_path):
    whole, alone = open_checkpoint(with_vision(tmp_path / "m")), open_checkpoint(ALONE)
    assert whole.names() == alone.names() and whole.path == tmp_path / "m"
    assert find_model(whole.config)[1] == find_model(alone.config)[1]
    for name in alone.names():
        assert (whole.shape(name), whole.dtype(name)) == (alone.shape(name), alone.dtype(name))
        assert whole.nbytes(name) == alone.nbytes(name) and whole.blocks(name) is None
        np.testing.assert_array_equal(whole.read(name), alone.read(name))
    np.testing.assert_array_equal(loaded(tmp_path / "m")["norm"], loaded(ALONE)["norm"])


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path):
    """Gemma 3 of 4B gives few of its sizes."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    checkpoint = open_checkpoint(with_vision(tmp_path / "m", text_config=text))
    c = find_model(checkpoint.config)[1]
    assert (c.heads, c.kv_heads, c.head_dim, c.vocab, c.max_positions) == (8, 4, 256, 262208, 131072)
    assert (c.scale, c.eps, c.tied, c.local[:7]) == (256**-0.5, 1e-6, True, (*[True] * 5, False, True))
    assert (c.rope.theta, c.rope.factor, c.local_rope.theta, c.local_rope.kind) == (1e6, 8.0, 1e4, "default")
    written = hyperparameters(checkpoint.config)
    assert written["gemma3.attention.key_length"] == 256 and written["gemma3.rope.freq_base"] == 1e6
    assert written["gemma3.context_length"] == 131072 and written["gemma3.attention.head_count_kv"] == 4


def test_it_is_written_as_a_text_model(tmp_path):
    src = with_vision(tmp_path / "m")
    assert hf_tensors(open_checkpoint(src)).keys() == hf_tensors(open_checkpoint(ALONE)).keys()
    convert(src, tmp_path / "orbax")
    after = open_checkpoint(tmp_path / "orbax")
    assert after.config["architectures"] == ["Gemma3ForCausalLM"] and after.names() == open_checkpoint(src).names()


def test_other_tensors_are_not_passed_over(tmp_path):
    src = with_vision(tmp_path / "m", extra=("audio_tower.weight", "language_model.model.extra.weight"))
    with pytest.raises(CheckpointError, match=r"unexpected tensor \(2\): audio_tower\.weight; model\.extra\.weight"):
        loaded(src)


def test_what_is_missing_or_not_served_is_named(tmp_path):
    with pytest.raises(ConfigError, match="config.json has no text_config"):
        open_checkpoint(with_vision(tmp_path / "a", text_config=None))
    quantised = open_checkpoint(with_vision(tmp_path / "b", quantization_config={"bits": 4}))
    with pytest.raises(ConfigError, match="quantization_config"):
        find_model(quantised.config)
