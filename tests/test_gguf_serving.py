"""GGUF files through the whole engine: llama.cpp's own log-probabilities, and a token alone and in a crowd."""

import json

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ConfigError
from jaxserve.formats import FORMATS

# How far log-probabilities may lie from llama.cpp's, which rounds activations as well: to bytes, in blocks of its own,
# and for BF16 to that, where ours stay float32.
TOLERANCES = {
    "f32": 1e-3, "F16": 0.02, "BF16": 0.03, "Q8_0": 0.1, "Q4_0": 0.15, "Q4_1": 0.15, "Q5_0": 0.15, "IQ4_NL": 0.15,
}  # fmt: skip
SMALL = dict(max_num_seqs=8, max_num_batched_tokens=64, num_kv_pages=64, max_model_len=256, warmup="lazy")


def opened(path, **options):
    return LLM(str(path), **SMALL | options)


@pytest.mark.parametrize(
    ("model", "kind"),
    [("stories260K", k) for k in ("f32", "Q8_0")] + [("babyllama361", k) for k in TOLERANCES],
)
def test_log_probabilities_are_llama_cpps(shared_data, model, kind):
    path = shared_data / "models" / model / f"{model}-{kind}.gguf"
    golden = json.loads(path.with_name(path.name + ".golden.json").read_text())
    with opened(path) as llm:
        cases = golden["cases"]
        for case in cases:
            assert list(llm.text.encode_prompt(case["prompt"])) == case["prompt_ids"]
        scores = llm.score([c["prompt_ids"] for c in cases], [c["ids"] for c in cases])
    errors = [np.abs(np.subtract(s.token_logprobs, c["logprobs"])) for s, c in zip(scores, cases, strict=True)]
    # In stories260K's Q8_0 one of llama.cpp's lies 0.109 from what the same weights give without any rounding.
    largest = 0.15 if (model, kind) == ("stories260K", "Q8_0") else TOLERANCES[kind]
    assert max(e.max() for e in errors) < largest
    assert np.concatenate(errors).mean() < max(largest / 8, 1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_a_token_does_not_depend_on_its_neighbours(shared_data, kind):
    """The same logprobs, to the last bit, alone and in a crowd whose prompts are cut elsewhere."""
    path = shared_data / "models/babyllama361" / f"babyllama361-{kind}.gguf"
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 300, int(n)).tolist() for n in rng.integers(5, 120, 8)]
    greedy = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
    with opened(path, enable_prefix_caching=False) as llm:
        alone = [llm.generate([p], greedy)[0].outputs[0] for p in prompts]
        crowd = [r.outputs[0] for r in llm.generate(prompts, greedy)]
    for one, other in zip(alone, crowd, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs


def test_without_the_kernels_a_quantised_model_is_multiplied_in_float32(shared_data):
    """And the kernels, which round activations to bytes, stay near to that."""
    path = shared_data / "models/babyllama361/babyllama361-Q5_0.gguf"
    cases = json.loads(path.with_name(path.name + ".golden.json").read_text())["cases"]
    found = {}
    for body in ("reference", "cpu"):
        with opened(path, attention=body) as llm:
            scores = llm.score([c["prompt_ids"] for c in cases], [c["ids"] for c in cases])
            found[body] = np.concatenate([s.token_logprobs for s in scores])
    error = np.abs(found["cpu"] - found["reference"])
    assert 0 < error.max() < 0.1 and error.mean() < 0.01


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"0" * 100)
    with pytest.raises(ConfigError, match="no GGUF file"):
        LLM(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        LLM(str(tmp_path / "absent.gguf"))


def test_every_format_has_its_kernel():
    """The names that the table knows are those that the C++ sources list."""
    from jaxserve.native.build import SOURCES

    source = (SOURCES / "blocks.h").read_text()
    for format in FORMATS.values():
        if format.quantised:
            assert f"case {format.code}: return call({format.name}{{}})" in source, format.name


def test_the_cache_takes_16_bits_where_the_weights_do(shared_data):
    models = shared_data / "models"
    bits = {}
    for name, options in {
        "f32": {}, "Q8_0": {}, "Q8_0 float32": {"kv_cache_dtype": "float32"}, "Q8_0 bfloat16": {"dtype": "bfloat16"},
        "f32 float16": {"kv_cache_dtype": "float16"},
    }.items():  # fmt: skip
        with opened(models / f"stories260K/stories260K-{name.split()[0]}.gguf", **options) as llm:
            bits[name] = llm.info.device_bytes["kv"]
            assert llm.generate(["Once upon a time"], SamplingParams(max_tokens=4, temperature=0))[0].outputs[0].text
    assert bits["f32"] == bits["Q8_0 float32"] == 2 * bits["Q8_0"]
    assert bits["Q8_0"] == bits["Q8_0 bfloat16"] == bits["f32 float16"]
    with pytest.raises(ConfigError, match="kv_cache_dtype float16 .*--kv-cache-dtype float32"):
        opened(models / "stories260K", attention="reference", kv_cache_dtype="float16")


@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
def test_a_plain_checkpoint_is_quantised_while_it_is_loaded(kind):
    """The embedded model in a third of its bytes, and its answers nearly the same."""
    with LLM(**SMALL) as plain, LLM(**SMALL, quantization=kind) as small:
        before, after = plain.info.device_bytes["weights"], small.info.device_bytes["weights"]
        assert after < before * {"q8_0": 0.54, "q4_k": 0.36}[kind]
        ids = plain.text.encode_prompt("The capital of France is Paris. Seven plus five is twelve.")
        want, got = (m.score([ids[:1]], [ids[1:]])[0].token_logprobs for m in (plain, small))
        error = np.abs(np.subtract(got, want))
        assert 0 < error.mean() < {"q8_0": 0.1, "q4_k": 0.6}[kind]


def test_what_is_quantised_is_not_quantised_again(shared_data):
    with pytest.raises(ConfigError, match="Q8_0 already"):
        opened(shared_data / "models/stories260K/stories260K-Q8_0.gguf", quantization="q4_0")
    with pytest.raises(ConfigError, match="Q8_0 already"):
        opened(shared_data / "models/stories260K/stories260K-Q8_0.gguf", quantization="q4_0", attention="reference")
    with pytest.raises(ConfigError, match="quantization q5_k needs the CPU and its C"):
        opened(shared_data / "models/stories260K", quantization="q5_k", attention="reference")
