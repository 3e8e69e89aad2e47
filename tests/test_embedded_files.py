"""Checks that the shipped demo model's files agree with each other; reads them as files, without jaxserve."""

import json
from pathlib import Path

import jinja2.sandbox
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

EMBEDDED = Path(__file__).resolve().parent.parent / "jaxserve" / "embedded"


def read(name: str) -> dict:
    return json.loads((EMBEDDED / name).read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))


@pytest.fixture(scope="module")
def template() -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(read("tokenizer_config.json")["chat_template"])


def test_the_package_stays_small():
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) < 12e6


def test_config_describes_a_tied_llama():
    config = read("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] >= 1024
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert not config["attention_bias"] and not config["mlp_bias"] and config["rope_scaling"] is None


def test_weights_are_exactly_those_of_the_config():
    c = read("config.json")
    width, inner = c["hidden_size"], c["intermediate_size"]
    queries, keys = (c[n] * c["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    expected = {"model.embed_tokens.weight": [c["vocab_size"], width], "model.norm.weight": [width]}
    block = {
        "input_layernorm": [width],
        "self_attn.q_proj": [queries, width],
        "self_attn.k_proj": [keys, width],
        "self_attn.v_proj": [keys, width],
        "self_attn.o_proj": [width, queries],
        "post_attention_layernorm": [width],
        "mlp.gate_proj": [inner, width],
        "mlp.up_proj": [inner, width],
        "mlp.down_proj": [width, inner],
    }
    for i in range(c["num_hidden_layers"]):
        expected |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    with safe_open(EMBEDDED / "model.safetensors", "np") as weights:
        found = {name: weights.get_slice(name) for name in weights.keys()}
        assert {name: part.get_shape() for name, part in found.items()} == expected
        assert {part.get_dtype() for part in found.values()} == {"BF16"}


def test_weights_say_how_they_were_made():
    with safe_open(EMBEDDED / "model.safetensors", "np") as weights:
        metadata = weights.metadata()
    assert metadata["format"] == "pt"
    assert metadata["training_command"].startswith("python tools/train_tiny.py")
    assert 0 < float(metadata["final_loss"]) < 1
    assert metadata["seed"].isdigit()
    card = (EMBEDDED / "README.md").read_text()
    assert metadata["training_command"] in card and metadata["final_loss"] in card and "apache-2.0" in card


def test_ids_agree_across_files(tokenizer):
    config, generation, settings = (read(f"{n}.json") for n in ("config", "generation_config", "tokenizer_config"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert generation["eos_token_id"] == config["eos_token_id"]
    assert tokenizer.token_to_id(settings["eos_token"]) in config["eos_token_id"]
    assert tokenizer.token_to_id(settings["bos_token"]) == config["bos_token_id"] == generation["bos_token_id"]
    assert tokenizer.token_to_id(settings["pad_token"]) == config["pad_token_id"] == generation["pad_token_id"]
    for i, token in settings["added_tokens_decoder"].items():
        assert tokenizer.id_to_token(int(i)) == token["content"] and token["special"]
    assert settings["model_max_length"] == config["max_position_embeddings"]


@pytest.mark.parametrize(
    "text", ["What is 7 + 5?", " naïve 東京 🙂👩‍👩‍👧", "\n\n\ttabs  and\r\nlines ", "\x00\x7f", ""]
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_read_one_by_one(tokenizer):
    assert tokenizer.encode("12345").tokens == list("12345")


def test_template_renders_a_chat_whose_marks_are_single_tokens(template, tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    text = template.render(messages=chat, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    start, stop = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    ids = tokenizer.encode(text).ids
    assert ids.count(start) == 3 and ids.count(stop) == 2
    assert template.render(messages=chat[1:]) == "<|im_start|>user\nHi<|im_end|>\n"


def test_template_refuses_an_unknown_role(template):
    with pytest.raises(jinja2.TemplateError, match="unknown role"):
        template.render(messages=[{"role": "narrator", "content": "Once"}])
