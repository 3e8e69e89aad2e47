"""`jaxserve quantize`: its files read back, beside llama.cpp's, and by the `gguf` package; and all that it refuses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxserve import cli
from jaxserve.cli import quantize as command
from jaxserve.errors import ConfigError
from jaxserve.formats import FORMATS, dequantise, quantise
from jaxserve.gguf import GgufFile
from jaxserve.models import find_model
from jaxserve.tokenizer import load_tokenizer
from jaxserve.tokenizer.gguf_export import text_metadata
from jaxserve.weights import open_checkpoint
from jaxserve.weights.gguf_export import gguf_name, size_label
from jaxserve.weights.gguf_write import TensorToWrite, write_gguf
from jaxserve.weights.mixes import MIXES, choose

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 256, 8, 2, 32, 512, 8
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TRAINING = [
    "It's 2024, the café costs 12345 dollars.",
    "  indented\n\n\tcode x1 = y22;",
    "don't DON'T привет 你好 ...",
] * 20


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXSERVE_DATA", raising=False)


def byte_level_tokenizer(split: str | None, *, nfc: bool = False, ignore_merges: bool = False, bos: bool = False):
    """A small byte-level BPE, trained here; `split` cuts text, None as GPT-2 does."""
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        model.normalizer = tokenizers.normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    cut = [] if split is None else [pre_tokenizers.Split(tokenizers.Regex(split), "isolated")]
    model.pre_tokenizer = pre_tokenizers.Sequence([*cut, level])
    model.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|begin_of_text|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TRAINING, trainer)
    model.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    if bos:
        model.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
    return model


QWEN2_TOKENIZER = SimpleNamespace(split=QWEN2, nfc=True, ignore_merges=False, bos=False)
LLAMA3_TOKENIZER = SimpleNamespace(split=LLAMA3, nfc=False, ignore_merges=True, bos=True)


def checkpoint(
    path: Path,
    architecture: str,
    *,
    tokenizer: SimpleNamespace = QWEN2_TOKENIZER,
    dtype: np.dtype | type = np.float32,
    tied: bool = False,
    biases: tuple[str, ...] = (),
    norms: bool = False,
    layers: int = LAYERS,
    width: int = WIDTH,
    **config: object,
) -> Path:
    """A small model directory in Hugging Face's layout with random weights."""
    path.mkdir()
    model = byte_level_tokenizer(**vars(tokenizer))
    model.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"})
    )
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 7], "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    )
    vocab = model.get_vocab_size() + 3  # padded, as many are
    (path / "config.json").write_text(
        json.dumps(
            {
                "architectures": [architecture], "hidden_size": width, "num_hidden_layers": layers,
                "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
                "intermediate_size": FFN, "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
                "rope_theta": 1e6, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1,
            }
            | config
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, width)
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, width),
            f"{at}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, width),
            f"{at}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, width),
            f"{at}.self_attn.o_proj.weight": (width, HEADS * HEAD_DIM),
            f"{at}.mlp.gate_proj.weight": (FFN, width),
            f"{at}.mlp.up_proj.weight": (FFN, width),
            f"{at}.mlp.down_proj.weight": (width, FFN),
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.post_attention_layernorm.weight": (width,),
        }
        shapes |= {f"{at}.self_attn.{b}_proj.bias": ((HEADS if b == "q" else KV_HEADS) * HEAD_DIM,) for b in biases}
        if norms:
            shapes |= {f"{at}.self_attn.{part}_norm.weight": (HEAD_DIM,) for part in "qk"}
    save_file({n: rng.normal(scale=0.02, size=s).astype(dtype) for n, s in shapes.items()}, path / "model.safetensors")
    return path


def quantize(*args: object) -> int:
    return cli.call(["quantize", *map(str, args)])


def formats(path: Path) -> dict[str, str]:
    return {name: info.format.name for name, info in GgufFile(path).tensors.items()}


# --- whole models


MODELS = {
    "qwen2": ("Qwen2ForCausalLM", {"biases": ("q", "k", "v"), "tied": True}),
    "qwen3": ("Qwen3ForCausalLM", {"norms": True, "tied": True, "dtype": ml_dtypes.bfloat16}),
    "llama": ("LlamaForCausalLM", {"tokenizer": LLAMA3_TOKENIZER}),
    "biased": ("LlamaForCausalLM", {"tokenizer": LLAMA3_TOKENIZER, "biases": ("q", "k", "v")}),
    "llama3": (
        "LlamaForCausalLM",
        {
            "tokenizer": LLAMA3_TOKENIZER,
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "linear": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}, "dtype": np.float16}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 512}),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_comes_back_as_it_was(tmp_path, model) -> None:
    architecture, options = MODELS[model]
    src = checkpoint(tmp_path / "src", architecture, layers=2, **options)
    assert quantize(src, tmp_path / "m.gguf", "F32") == 0
    before, after = open_checkpoint(src), open_checkpoint(tmp_path / "m.gguf")
    assert after.names() == before.names()
    for name in before.names():
        np.testing.assert_array_equal(after.read(name), before.read(name).astype(np.float32), err_msg=name)
    same = (
        "architectures num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_size "
        "intermediate_size vocab_size max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings"
    )
    assert {k: after.config[k] for k in same.split()} == {k: before.config[k] for k in same.split()}
    assert after.config.get("sliding_window") == before.config.get("sliding_window")
    wanted = before.config.get("rope_scaling") or {}
    found = after.config["rope_scaling"] or {}
    assert found.get("rope_type") == (wanted.get("rope_type") or wanted.get("type"))
    assert {k: v for k, v in found.items() if k != "rope_type"} == {
        k: v for k, v in wanted.items() if k not in ("rope_type", "type")
    }


@pytest.mark.parametrize("model", ["qwen2", "llama"])
def test_text_comes_back_as_it_was(tmp_path, model) -> None:
    architecture, options = MODELS[model]
    src = checkpoint(tmp_path / "src", architecture, layers=1, **options)
    assert quantize(src, tmp_path / "m.gguf", "Q8_0") == 0
    before, after = load_tokenizer(src), load_tokenizer(tmp_path / "m.gguf")
    for text in (*TRAINING[:3], "<think>a</think>", "e\u0301 é 1234567"):
        assert after.encode(text) == before.encode(text)
        ids = before.encode(text)
        assert after.decode(ids) == before.decode(ids)
    assert (after.encode("a")[0] == 0) == (model == "llama")
    assert after.eos_token_ids == before.eos_token_ids == (1,)
    metadata = GgufFile(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == {"qwen2": "qwen2", "llama": "llama-bpe"}[model]
    assert metadata["tokenizer.ggml.tokens"][-1].startswith("[PAD")
    assert metadata["tokenizer.ggml.eot_token_id"] == 7
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert metadata["general.sampling.top_k"] == 20
    assert metadata["general.sampling.temp"] == pytest.approx(0.6)


def test_the_gguf_package_reads_the_file(tmp_path) -> None:
    src = checkpoint(tmp_path / "src", "Qwen3ForCausalLM", norms=True, layers=2)
    assert quantize(src, tmp_path / "m.gguf", "Q4_K_M", "--threads", 2) == 0
    file, ours = gguf.GGUFReader(tmp_path / "m.gguf"), GgufFile(tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in file.tensors}
    assert list(found) == list(ours.tensors)
    weights = load_file(src / "model.safetensors")
    for name, hf in (
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        tensor = found[name]
        back = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.sqrt(np.mean((back - weights[hf]) ** 2)) < 0.08 * 0.02
    for field in (
        "general.file_type",
        "general.quantization_version",
        "qwen3.block_count",
        "qwen3.attention.head_count",
    ):
        assert file.fields[field].types == [gguf.GGUFValueType.UINT32], field
    assert file.fields["qwen3.rope.freq_base"].types == [gguf.GGUFValueType.FLOAT32]
    assert file.fields["tokenizer.ggml.token_type"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert file.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert file.fields["tokenizer.ggml.tokens"].contents() == ours.metadata["tokenizer.ggml.tokens"]


BABYLLAMA = "models/babyllama361"


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_llama_cpps_own_files(tmp_path, shared_data, kind) -> None:
    """Byte for byte what its converter and its quantiser made of the same checkpoint."""
    folder = shared_data / BABYLLAMA
    reference = folder / f"babyllama361-{kind.replace('F32', 'f32')}.gguf"
    if not reference.is_file():
        pytest.skip(f"no {reference.name} among the reference data")
    assert quantize(folder, tmp_path / "m.gguf", kind) == 0
    ours, theirs = GgufFile(tmp_path / "m.gguf"), GgufFile(reference)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, info in theirs.tensors.items():
        assert (ours.tensors[name].format, ours.tensors[name].shape) == (info.format, info.shape), name
        np.testing.assert_array_equal(ours.raw(name), theirs.raw(name), err_msg=name)
    other = {"general.name", "tokenizer.ggml.add_sep_token"}  # free text; of no meaning to this model
    assert ours.metadata.keys() | other == theirs.metadata.keys() | other
    for key in theirs.metadata.keys() - other:
        np.testing.assert_array_equal(ours.metadata[key], theirs.metadata[key], err_msg=key)
    fields = [gguf.GGUFReader(path).fields for path in (tmp_path / "m.gguf", reference)]
    assert {k: fields[0][k].types for k in theirs.metadata.keys() - other} == {
        k: fields[1][k].types for k in theirs.metadata.keys() - other
    }


def test_a_sentencepiece_vocabulary_of_which_only_tokenizer_json_is_left(tmp_path, shared_data) -> None:
    source = shared_data / "models" / "stories260K"
    src = tmp_path / "src"
    src.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, src)
    assert quantize(src, tmp_path / "m.gguf", "F16") == 0
    text = "Once upon a time, there was a little girl named Lily. 你好\n\n  3 dogs"
    assert load_tokenizer(tmp_path / "m.gguf").encode(text) == load_tokenizer(source).encode(text)
    ours = GgufFile(tmp_path / "m.gguf").metadata
    theirs = GgufFile(source / "stories260K-f32.gguf").metadata
    for key in ("model", "tokens", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token"):
        np.testing.assert_array_equal(ours[f"tokenizer.ggml.{key}"], theirs[f"tokenizer.ggml.{key}"], err_msg=key)


@pytest.mark.parametrize(("folder", "pre"), [("qwen3", "qwen2"), ("granite", "gpt-2")])
def test_real_tokenizers_are_recognised(shared_data, folder, pre) -> None:
    path = shared_data / "tokenizers" / folder
    if not (path / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer of {folder} among the reference data")
    found = text_metadata(path, 0, {})
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", pre)
    assert (
        len(found["tokenizer.ggml.tokens"])
        == len(found["tokenizer.ggml.token_type"])
        >= load_tokenizer(path).vocab_size
    )


# --- GGUF to GGUF


def test_a_gguf_file_as_source(tmp_path, capsys) -> None:
    src = checkpoint(tmp_path / "src", "LlamaForCausalLM", tokenizer=LLAMA3_TOKENIZER, layers=2)
    assert quantize(src, tmp_path / "f32.gguf", "F32") == 0
    assert quantize(src, tmp_path / "direct.gguf", "Q4_K_M") == 0
    assert quantize(tmp_path / "f32.gguf", tmp_path / "through.gguf", "q4_k_m") == 0
    direct, through = tmp_path / "direct.gguf", tmp_path / "through.gguf"
    assert direct.read_bytes() == through.read_bytes()
    capsys.readouterr()
    # Again: what has its format already is copied, the rest is quantised a second time, which is said.
    assert quantize(through, tmp_path / "again.gguf", "Q4_K_M") == 0
    assert "quantised already" not in capsys.readouterr().err
    assert (tmp_path / "again.gguf").read_bytes() == through.read_bytes()
    assert quantize(through, tmp_path / "q8.gguf", "Q8_0") == 0
    assert "the source is quantised already (Q4_K, Q6_K)" in capsys.readouterr().err
    old, new = GgufFile(through), GgufFile(tmp_path / "q8.gguf")
    name = "blk.0.attn_q.weight"
    kind = FORMATS["Q8_0"]
    np.testing.assert_array_equal(new.raw(name), quantise(kind, dequantise(FORMATS["Q4_K"], old.raw(name))))
    assert new.metadata["general.file_type"] == 7 and list(new.metadata) == list(old.metadata)


def test_a_split_becomes_one_file(tmp_path) -> None:
    src = checkpoint(tmp_path / "src", "Qwen2ForCausalLM", layers=1)
    assert quantize(src, tmp_path / "whole.gguf", "F16") == 0
    whole = GgufFile(tmp_path / "whole.gguf")
    names = list(whole.tensors)
    for i, part in enumerate((names[:4], names[4:])):
        about = {"split.no": i, "split.count": 2, "split.tensors.count": len(names)}
        tensors = [
            TensorToWrite(n, whole.tensors[n].format, whole.tensors[n].shape, lambda n=n: [whole.raw(n)]) for n in part
        ]
        write_gguf(tmp_path / f"m-0000{i + 1}-of-00002.gguf", (dict(whole.metadata) if i == 0 else {}) | about, tensors)
    assert quantize(tmp_path / "m-00001-of-00002.gguf", tmp_path / "joined.gguf", "F16") == 0
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_threads_and_pieces_change_nothing(tmp_path, monkeypatch) -> None:
    src = checkpoint(tmp_path / "src", "Qwen2ForCausalLM", layers=1)
    assert quantize(src, tmp_path / "one.gguf", "Q5_K_M", "--threads", 1) == 0
    monkeypatch.setattr(command, "_PIECE", 7 * WIDTH)
    assert quantize(src, tmp_path / "many.gguf", "Q5_K_M", "--threads", 3) == 0
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


# --- which tensor gets what


def test_a_mix_raises_some_layers(tmp_path, capsys) -> None:
    src = checkpoint(tmp_path / "src", "LlamaForCausalLM", tokenizer=LLAMA3_TOKENIZER)
    assert quantize(src, tmp_path / "m.gguf", "Q4_K_M") == 0
    found = formats(tmp_path / "m.gguf")
    raised = [i for i in range(LAYERS) if found[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert raised == [0, 3, 6, 7]  # of 8: the first and last eighth, every third between
    assert raised == [i for i in range(LAYERS) if found[f"blk.{i}.attn_v.weight"] == "Q6_K"]
    assert found["output.weight"] == "Q6_K" and found["token_embd.weight"] == "Q4_K"
    assert {found[f"blk.{i}.attn_q.weight"] for i in range(LAYERS)} == {"Q4_K"}
    assert found["output_norm.weight"] == found["blk.0.attn_norm.weight"] == "F32"
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["format", "tensors", "before", "after"]
    assert out.splitlines()[-1].split()[:2] == ["all", str(len(found))]


@pytest.mark.parametrize("kind", sorted(MIXES))
def test_every_type_is_written_and_named(tmp_path, kind) -> None:
    src = checkpoint(tmp_path / "src", "Qwen2ForCausalLM", layers=1, tied=True)
    assert quantize(src, tmp_path / "m.gguf", kind) == 0
    file = GgufFile(tmp_path / "m.gguf")
    name = {"MXFP4": "MOSTLY_MXFP4_MOE", "F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M"}.get(kind, f"MOSTLY_{kind}")
    name = f"{name}_M" if kind in ("Q4_K", "Q5_K") else name
    assert file.metadata["general.file_type"] == gguf.LlamaFileType[name]
    assert file.tensors["blk.0.attn_q.weight"].format.name == kind.removesuffix("_M").removesuffix("_S")
    before, after = open_checkpoint(src), open_checkpoint(tmp_path / "m.gguf")
    for weight in before.names():
        off = after.read(weight).astype(np.float32) - before.read(weight)
        assert np.sqrt(np.mean(off**2) / np.mean(before.read(weight) ** 2)) < 0.3, weight


def test_rows_that_blocks_do_not_fill_get_smaller_blocks(tmp_path, capsys) -> None:
    src = checkpoint(tmp_path / "src", "Qwen2ForCausalLM", layers=1, width=96)
    assert quantize(src, tmp_path / "m.gguf", "Q4_K_S") == 0
    found = formats(tmp_path / "m.gguf")
    assert found["blk.0.attn_q.weight"] == "Q5_0" and found["output.weight"] == "Q8_0"
    assert found["blk.0.attn_v.weight"] == "Q5_1" and found["blk.0.ffn_down.weight"] == "Q4_K"
    err = capsys.readouterr().err
    assert "5 tensors have rows of 96, which blocks of 256 do not fill: Q5_0 instead of Q4_K" in err
    assert "1 tensor has rows of 96, which blocks of 256 do not fill: Q8_0 instead of Q6_K" in err


def test_choices_by_name_and_shape() -> None:
    dense = FORMATS["F16"]
    shapes = {
        "token_embd.weight": (100, 256), "output.weight": (100, 256), "blk.0.attn_norm.weight": (256,),
        "blk.0.ffn_gate_inp.weight": (8, 256), "blk.0.ffn_down_exps.weight": (8, 256, 256),
        "blk.0.attn_v.weight": (64, 256), "blk.0.ffn_down.weight": (256, 100), "blk.0.attn_q.bias": (256,),
    }  # fmt: skip
    found = choose(MIXES["Q2_K"], {n: (dense, s) for n, s in shapes.items()}, layers=8, sharing=4)
    assert {name: choice.format.name for name, choice in found.items()} == {
        "token_embd.weight": "Q2_K", "output.weight": "Q6_K", "blk.0.attn_norm.weight": "F32",
        "blk.0.ffn_gate_inp.weight": "F16", "blk.0.ffn_down_exps.weight": "Q3_K", "blk.0.attn_v.weight": "Q4_K",
        "blk.0.ffn_down.weight": "F16", "blk.0.attn_q.bias": "F32",
    }  # fmt: skip
    assert found["blk.0.ffn_down.weight"].instead_of is FORMATS["Q3_K"]
    assert found["blk.0.attn_v.weight"].instead_of is None
    few = choose(MIXES["Q2_K"], {"blk.0.attn_v.weight": (dense, (64, 256))}, layers=8, sharing=1)
    assert few["blk.0.attn_v.weight"].format.name == "Q3_K"
    # Eight experts make attention a small part of the model.
    attention = {f"blk.0.attn_{part}.weight": (dense, (256, 256)) for part in ("q", "k", "v", "output")}
    for mix, wanted in {
        "Q4_K_M": "Q4_K Q8_0 Q8_0 Q5_K",
        "Q4_0": "Q4_0 Q8_0 Q8_0 Q4_0",
        "F16": "F16 F16 F16 F16",
    }.items():
        found = choose(MIXES[mix], attention, layers=8, sharing=1, experts=8)
        assert [choice.format.name for choice in found.values()] == wanted.split()


# --- what is refused


def refused(capsys, *args: object) -> str:
    assert quantize(*args) == cli.USAGE
    return capsys.readouterr().err


def test_wrong_arguments(tmp_path, capsys) -> None:
    src = checkpoint(tmp_path / "src", "Qwen2ForCausalLM", layers=1)
    dst = tmp_path / "m.gguf"
    assert "type 'Q4_9' is not known; known are F32, F16" in refused(capsys, src, dst, "Q4_9")
    assert "threads must be at least 1" in refused(capsys, src, dst, "Q8_0", "--threads", 0)
    assert "no such directory" in refused(capsys, tmp_path / "none", dst, "Q8_0")
    dst.write_bytes(b"mine")
    assert "exists; remove it or name another" in refused(capsys, src, dst, "Q8_0")
    assert dst.read_bytes() == b"mine"
    (tmp_path / "n.gguf.tmp").touch()
    assert "another run is writing it" in refused(capsys, src, tmp_path / "n.gguf", "Q8_0")
    assert (tmp_path / "n.gguf.tmp").exists()
    assert "cannot be written" in refused(capsys, src, tmp_path / "no" / "m.gguf", "Q8_0")


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
def test_weights_that_are_no_numbers_are_named_and_leave_no_file(tmp_path, capsys, kind) -> None:
    src = checkpoint(tmp_path / "src", "Qwen2ForCausalLM", layers=1)
    weights = load_file(src / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][300, 5] = np.nan
    save_file(weights, src / "model.safetensors")
    message = refused(capsys, src, tmp_path / "m.gguf", kind)
    assert "tensor blk.0.ffn_up.weight: row 300 holds nan" in message
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_what_gguf_has_no_word_for(tmp_path, capsys) -> None:
    cases = {
        "GemmaForCausalLM": ({}, "architectures ['GemmaForCausalLM'] cannot be written as GGUF"),
        "Qwen2ForCausalLM": ({"use_sliding_window": True, "sliding_window": 64}, "sliding windows of qwen2"),
        "LlamaForCausalLM": ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope scaling 'yarn'"),
        "Qwen3ForCausalLM": ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "rope scaling llama3 of qwen3"),
    }
    for architecture, (config, message) in cases.items():
        src = checkpoint(tmp_path / architecture, architecture, layers=1, **config)
        assert message in refused(capsys, src, tmp_path / "m.gguf", "Q8_0")


def expert_checkpoint(path: Path, architecture: str, *, experts: int = 8, **config: object) -> Path:
    """`checkpoint` with experts of FFN / 4 in place of the feed-forward layers."""
    checkpoint(
        path, architecture, layers=2, norms=architecture.startswith("Qwen3"), num_local_experts=experts,
        num_experts_per_tok=2, moe_intermediate_size=FFN // 4, norm_topk_prob=True,
        intermediate_size=FFN // 4 if architecture.startswith("Mixtral") else FFN, **config,
    )  # fmt: skip
    rng, weights = np.random.default_rng(1), load_file(path / "model.safetensors")
    mixtral = architecture.startswith("Mixtral")
    names = dict(zip(("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), strict=True)) if mixtral else {}
    at = "block_sparse_moe" if mixtral else "mlp"
    for i in range(2):
        layer = f"model.layers.{i}"
        for part, shape in {"gate": (128, WIDTH), "up": (128, WIDTH), "down": (WIDTH, 128)}.items():
            del weights[f"{layer}.mlp.{part}_proj.weight"]
            name = names.get(f"{part}_proj", f"{part}_proj")
            for e in range(experts):
                weights[f"{layer}.{at}.experts.{e}.{name}.weight"] = rng.normal(scale=0.05, size=shape).astype(
                    np.float32
                )
        weights[f"{layer}.{at}.gate.weight"] = rng.normal(size=(experts, WIDTH)).astype(np.float32)
    save_file(weights, path / "model.safetensors")
    return path


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_are_written_as_stacks_and_come_back(tmp_path, architecture) -> None:
    src = expert_checkpoint(tmp_path / "src", architecture)
    for kind in ("F32", "Q4_0"):
        assert quantize(src, tmp_path / f"{kind}.gguf", kind) == 0
    want, plain, small = (open_checkpoint(tmp_path / name) for name in ("src", "F32.gguf", "Q4_0.gguf"))
    assert want.names() == plain.names() == small.names()
    # The tensors say the same through the file; `find_model` that the sizes do.
    assert find_model(want.config)[1] == find_model(plain.config)[1] == find_model(small.config)[1]
    for name in want.names():
        np.testing.assert_array_equal(plain.read(name), want.read(name))
        if ".experts." in name:
            stored = small.blocks(name)
            np.testing.assert_array_equal(stored.rows, quantise(FORMATS["Q4_0"], want.read(name)))
    router = "block_sparse_moe.gate" if architecture == "MixtralForCausalLM" else "mlp.gate"
    assert small.blocks(f"model.layers.0.{router}.weight") is None


def test_experts_that_gguf_has_no_word_for(tmp_path, capsys) -> None:
    for i, (change, message) in enumerate(
        {
            ("norm_topk_prob", False): "experts' weights that are not normalised (norm_topk_prob) have no key",
            ("mlp_only_layers", (0,)): "mlp_only_layers",
            ("decoder_sparse_step", 2): "decoder_sparse_step=2",
            ("num_experts_per_tok", 9): "num_experts_per_tok=9",
            ("num_local_experts", 7): "experts that do not make a stack (6): model.layers.0.mlp.experts.*.down_proj",
        }.items()
    ):
        src = expert_checkpoint(tmp_path / str(i), "Qwen3MoeForCausalLM") if i == 0 else src
        config = json.loads((src / "config.json").read_text())
        (src / "config.json").write_text(json.dumps(config | dict([change])))
        assert message in refused(capsys, src, tmp_path / "m.gguf", "Q8_0")
        (src / "config.json").write_text(json.dumps(config))


def test_tensors_without_a_name_are_all_told(tmp_path, capsys) -> None:
    src = checkpoint(tmp_path / "src", "Qwen2ForCausalLM", layers=1)
    weights = load_file(src / "model.safetensors")
    weights |= {"model.layers.0.extra.weight": np.ones(2, np.float32), "other": np.ones(2, np.float32)}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    weights["model.norm.weight"] = np.ones(WIDTH, np.int32)
    save_file(weights, src / "model.safetensors")
    message = refused(capsys, src, tmp_path / "m.gguf", "Q8_0")
    assert "tensor without a name in GGUF (2): model.layers.0.extra.weight; other" in message
    assert "model.norm.weight is int32" in message and "inv_freq" not in message


def test_a_way_of_cutting_text_without_a_name_is_refused(tmp_path, capsys) -> None:
    odd = SimpleNamespace(split=r"\p{L}+|[^\p{L}]+", nfc=False, ignore_merges=False, bos=False)
    src = checkpoint(tmp_path / "src", "Qwen2ForCausalLM", layers=1, tokenizer=odd)
    assert "no way of cutting text that GGUF has a name for" in refused(capsys, src, tmp_path / "m.gguf", "Q8_0")


def test_another_kind_of_vocabulary_is_refused(tmp_path, capsys) -> None:
    src = checkpoint(tmp_path / "src", "LlamaForCausalLM", layers=1)
    model = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|im_end|>": 1}, unk_token="a"))
    model.decoder = decoders.ByteLevel()
    model.save(str(src / "tokenizer.json"))
    assert "vocabulary of type 'WordLevel'" in refused(capsys, src, tmp_path / "m.gguf", "Q8_0")


# --- the container


def test_every_type_of_metadata_comes_back(tmp_path) -> None:
    values = {
        "general.architecture": "none", "flag": True, "small": 7, "negative": -7, "large": 2**40, "far": -(2**40),
        "short": 0.6, "exact": 0.5, "huge": 1e300, "tiny": 1e-300, "text": "Grüße\udcff", "words": ["a", "", "ü"],
        "nothing": [], "floats": np.array([0.5, -1], np.float32), "bytes": np.arange(3, dtype=np.uint8),
        "signed": np.array([-5, 5], np.int32), "flags": np.array([True, False]),
        "nested": [["x"], np.array([1, 2], np.int16)],
    }  # fmt: skip
    write_gguf(tmp_path / "m.gguf", values, [])
    found = GgufFile(tmp_path / "m.gguf").metadata
    assert list(found) == list(values)
    assert found["short"] == pytest.approx(0.6, rel=1e-6)
    for key in values.keys() - {"short", "nested"}:
        np.testing.assert_array_equal(found[key], values[key], err_msg=key)
    assert found["signed"].dtype == np.int32 and found["bytes"].dtype == np.uint8 and found["flags"].dtype == bool
    assert found["nested"][0] == ["x"] and found["nested"][1].tolist() == [1, 2]
    types = {k: field.types[0].name for k, field in gguf_fields(tmp_path / "m.gguf", values).items()}
    assert types["small"] == "UINT32" and types["large"] == "UINT64" and types["negative"] == "INT32"
    assert (
        types["short"] == types["exact"] == "FLOAT32"
        and types["huge"] == types["tiny"] == "FLOAT64"
        and types["flag"] == "BOOL"
    )


def gguf_fields(path: Path, values: dict[str, object]) -> dict[str, gguf.gguf_reader.ReaderField]:
    """As the gguf package reads the scalars."""
    write_gguf(path.with_name("scalars.gguf"), {k: v for k, v in values.items() if np.isscalar(v) and k != "text"}, [])
    fields = gguf.GGUFReader(path.with_name("scalars.gguf")).fields
    return {key: fields[key] for key in values if key in fields}


@pytest.mark.parametrize("alignment", [32, 128])
def test_tensors_are_aligned(tmp_path, alignment) -> None:
    arrays = {f"t{i}": np.arange(n, dtype=np.float32) for i, n in enumerate((1, 9, 33))}
    tensors = [
        TensorToWrite(name, FORMATS["F32"], a.shape, lambda a=a: [a[None].view(np.uint8)]) for name, a in arrays.items()
    ]
    write_gguf(tmp_path / "m.gguf", {"general.alignment": alignment}, tensors)
    file = GgufFile(tmp_path / "m.gguf")
    for name, array in arrays.items():
        assert file.tensors[name].offset % alignment == 0
        np.testing.assert_array_equal(file.raw(name).view(np.float32)[0], array)
    assert (tmp_path / "m.gguf").stat().st_size % alignment == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_do_not_add_up_leave_no_file(tmp_path, rows) -> None:
    tensor = TensorToWrite("t", FORMATS["F32"], (2, 4), lambda: [np.zeros((rows, 16), np.uint8)])
    with pytest.raises(ValueError, match=f"tensor t got {rows * 16} of its 32 bytes"):
        write_gguf(tmp_path / "m.gguf", {}, [tensor])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [None, object(), np.zeros((2, 2)), np.array(["a"]), ["a", 1], 2**70, -(2**70)])
def test_metadata_without_a_type_names_its_key(tmp_path, value) -> None:
    with pytest.raises(ValueError, match="some.key: "):
        write_gguf(tmp_path / "m.gguf", {"some.key": value}, [])
    assert not list(tmp_path.iterdir())


def test_names_and_labels() -> None:
    assert gguf_name("model.layers.12.self_attn.k_norm.weight", "qwen3") == "blk.12.attn_k_norm.weight"
    assert gguf_name("model.layers.2.post_attention_layernorm.weight", "qwen3") == "blk.2.ffn_norm.weight"
    assert gguf_name("model.layers.2.post_attention_layernorm.weight", "gemma2") == "blk.2.post_attention_norm.weight"
    for name in ("model.layers.x.self_attn.k_norm.weight", "transformer.h.0.weight"):
        assert gguf_name(name, "llama") is None
    assert [size_label(n) for n in (969_000, 1_235_814_400, 7_000_000_000, 70_600_000_000, 12)] == [
        "969K", "1.2B", "7B", "71B", "12",
    ]  # fmt: skip


def test_the_tokenizer_module_says_which_directory(tmp_path) -> None:
    with pytest.raises(ConfigError, match="neither tokenizer.json nor tokenizer.model"):
        text_metadata(tmp_path, 10, {})
