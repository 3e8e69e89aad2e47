"""Perplexity and the divergence from a reference: the rules, each figure against plain numpy, and llama.cpp's own."""

import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import WIDTH, model_tensors, write_model
from safetensors.numpy import load_file, save_file

from jaxserve import LLM, attention, cli, evaluate, perplexity
from jaxserve.config import DeviceOptions, ModelOptions
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.evaluate import Evaluator, check_models, token_scores
from jaxserve.hub import resolve_model
from jaxserve.loading import load_model
from jaxserve.logits_file import LogitsFile, LogitsWriter, Rows
from jaxserve.models import find_model
from jaxserve.perplexity import Running, Scores, chunks, compare, windows
from jaxserve.weights import open_checkpoint
from jaxserve.weights.load import load_params

GOLDENS = Path(__file__).parent / "goldens"
EMBEDDED = str(resolve_model(None))


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXSERVE_DATA", raising=False)


# --- chunks ---------------------------------------------------------------------------------------------------------


class Letters:
    """A token a letter; BOS is 0, EOS 1."""

    bos_token_id = 0

    def __init__(self, prefix: tuple[int, ...] = (), suffix: tuple[int, ...] = ()):
        self.prefix, self.suffix = prefix, suffix

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        assert not parse_special
        ids = [ord(letter) for letter in text]
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids


def test_a_text_is_cut_and_each_chunk_begins_with_bos():
    text = "abcdefghijklmnopqrstuvwxyz"
    plain = chunks(Letters(), text + "\n", 8)
    assert plain.dtype == np.int32
    assert ["".join(map(chr, c)) for c in plain] == ["abcdefgh", "ijklmnop", "qrstuvwx"]  # and yz is left over
    # BOS before the text takes a place, BOS at the other chunks stands for the token that was there.
    for tokenizer in (Letters((0,)), Letters((0,), (1,))):
        assert [c.tolist() for c in chunks(tokenizer, text, 8)] == [
            [0, *map(ord, "abcdefg")], [0, *map(ord, "ijklmno")], [0, *map(ord, "qrstuvw")],
        ]  # fmt: skip
    assert len(chunks(Letters((), (1,)), "a" * 16 + "\n", 8)) == 2
    assert len(chunks(Letters(), text, 8, 2)) == 2 and len(chunks(Letters(), text, 8, 9)) == 3


def test_what_cannot_be_cut_is_told_with_the_cure():
    with pytest.raises(
        ConfigError, match="24 tokens long.* needs at least 26; lower --ctx-size to 12 or less, or give"
    ):
        chunks(Letters(), "a" * 24, 13)
    with pytest.raises(
        ConfigError, match="15 tokens long, and a context of 512 needs at least 1024; give a longer text"
    ):
        chunks(Letters(), "a" * 15, 512)
    with pytest.raises(ConfigError, match="ctx_size must be at least 8, got 7"):
        chunks(Letters(), "a" * 99, 7)
    with pytest.raises(ConfigError, match="chunks must be at least 1, got 0"):
        chunks(Letters(), "a" * 99, 8, 0)


def test_windows_score_every_token_but_the_first_once():
    text = "abcdefghijklmnopqrstuvwxyz"
    for length, ctx, stride in [
        (26, 8, 4),
        (26, 8, 1),
        (26, 8, 7),
        (24, 8, 4),
        (8, 8, 3),
        (9, 8, 7),
        (5, 8, 4),
        (3, 8, 4),
    ]:
        found = windows(Letters(), text[:length] + "\n", ctx, stride)
        assert found[0].first == 0 and all(len(w.tokens) == ctx for w in found[:-1])
        assert all(w.first + 1 >= ctx - stride for w in found[1:])
        scored = [chr(token) for w in found for token in w.tokens[w.first + 1 :]]
        assert "".join(scored) == text[1:length]
        for i, w in enumerate(found):
            assert "".join(map(chr, w.tokens)) == text[:length][i * stride : i * stride + ctx]
    (first, *_) = windows(Letters((0,), (1,)), text, 8, 4)
    assert first.tokens.tolist() == [0, *map(ord, "abcdefg")], "BOS, and no EOS, where the tokenizer puts them"
    assert len(windows(Letters(), text, 8, 4, 2)) == 2
    for stride in (0, 8):
        with pytest.raises(ConfigError, match=r"stride must be in \[1, 7\]"):
            windows(Letters(), text, 8, stride)
    with pytest.raises(ConfigError, match="2 tokens long"):
        windows(Letters(), "ab", 8, 4)


# --- statistics -----------------------------------------------------------------------------------------------------


def sums(values):
    """Mean and its error by sums and sums of squares, as llama-perplexity takes them."""
    n = len(values)
    mean = math.fsum(values) / n
    return mean, math.sqrt((math.fsum(v * v for v in values) / n - mean**2) / (n - 1))


def test_statistics_are_those_of_sums():
    rng = np.random.default_rng(0)
    n = 257
    base = rng.gamma(1.0, 2.0, n)
    nll = np.abs(base + rng.normal(0, 0.3, n))
    kl, same = rng.gamma(0.5, 0.05, n), rng.random(n) < 0.9
    found = compare(Scores(nll, base, kl, same))

    (mean, err), (base_mean, base_err) = sums(nll), sums(base)
    ppl, base_ppl = math.exp(mean), math.exp(base_mean)
    assert perplexity.perplexity(nll) == pytest.approx((ppl, ppl * err))
    assert found.reference_ppl == pytest.approx((base_ppl, base_ppl * base_err))
    covariance = (math.fsum(nll * base) / n - mean * base_mean) / (n - 1)
    assert found.correlation == pytest.approx(covariance / (err * base_err))
    ratio_err = math.sqrt(err**2 + base_err**2 - 2 * covariance)
    ratio = math.exp(mean - base_mean)
    assert found.log_ratio == pytest.approx((mean - base_mean, ratio_err))
    assert found.ratio == pytest.approx((ratio, ratio * ratio_err))
    difference_err = math.sqrt((ppl * err) ** 2 + (base_ppl * base_err) ** 2 - 2 * ppl * base_ppl * covariance)
    assert found.difference == pytest.approx((ppl - base_ppl, difference_err))
    assert found.kl == pytest.approx(sums(kl))
    delta = np.exp(-nll) - np.exp(-base)
    assert found.delta_p == pytest.approx(sums(delta))
    square, square_err = sums(delta**2)
    assert found.delta_p_rms == pytest.approx((math.sqrt(square), square_err / (2 * math.sqrt(square))))
    share = same.sum() / n
    assert found.same_top == pytest.approx((share, math.sqrt(share * (1 - share) / (n - 1))))
    ordered = np.sort(kl)
    assert (found.kl_min, found.kl_percentiles[50.0], found.kl_max) == (ordered[0], ordered[128], ordered[-1])
    assert found.kl_percentiles[99.9] == pytest.approx(0.744 * ordered[256] + 0.256 * ordered[255])
    assert found.delta_p_max == delta.max() and found.delta_p_min == delta.min()
    assert found.delta_p_percentiles[25.0] == np.sort(delta)[64]


def test_equal_models_differ_by_nothing():
    nll = np.array([0.5, 2.0, 1.0])
    found = compare(Scores(nll, nll.copy(), np.zeros(3), np.ones(3, bool)))
    assert found.ratio == (1, 0) and found.delta_p_rms == (0, 0) and found.same_top == (1, 0)
    assert found.correlation == pytest.approx(1)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def oracle(logits, reference, targets):
    """nll, reference nll, divergence and agreement in float64, from the logits of every position."""
    logq, logp = log_softmax(logits), log_softmax(reference)
    rows = np.arange(len(targets))
    kl = (np.exp(logp) * (logp - logq)).sum(axis=-1)
    return -logq[rows, targets], -logp[rows, targets], kl, logits.argmax(-1) == reference.argmax(-1)


@pytest.mark.parametrize("noise", [3.0, 0.1, 1e-3])
def test_scores_of_logits_are_exact(noise):
    """Divergences far below float32's rounding of a log-probability too."""
    rng = np.random.default_rng(1)
    reference = (4 * rng.normal(size=(16, 5000))).astype(np.float32)
    logits = (reference + noise * rng.normal(size=reference.shape)).astype(np.float32)
    targets = rng.integers(0, 5000, 16).astype(np.int32)
    nll, base, kl, same = oracle(logits, reference, targets)
    found = jax.jit(token_scores)(logits, reference, targets)
    np.testing.assert_allclose(-found.logprob, nll, rtol=1e-5)
    np.testing.assert_allclose(-found.reference_logprob, base, rtol=1e-5)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-3, atol=1e-7)
    assert np.array_equal(found.same_top, same)


def test_a_mean_of_parts_is_that_of_the_whole():
    nll = np.random.default_rng(0).gamma(1.0, 2.0, 300)
    running = Running()
    for part in np.split(nll, [1, 2, 90, 180]):
        running.add(part)
    assert running.perplexity() == pytest.approx(tuple(perplexity.perplexity(nll)))
    mean, error = sums(nll)
    assert running.perplexity() == pytest.approx((math.exp(mean), math.exp(mean) * error))


def test_what_neither_model_ever_says_costs_nothing():
    reference = jnp.array([[0.0, 1.0, -jnp.inf]])
    found = token_scores(jnp.array([[1.0, 0.0, -jnp.inf]]), reference, jnp.array([0]))
    p = 1 / (1 + math.e)
    assert float(found.kl[0]) == pytest.approx((1 - p) * 1 - p * 1) and not found.same_top[0]


# --- models ---------------------------------------------------------------------------------------------------------


def loaded(path, body="reference", **options):
    return load_model(ModelOptions(**options), DeviceOptions(attention=body), path, lambda message: None)


def dense_logits(path, tokens):
    """Logits [T, V] of all positions at once, without a cache, in float32."""
    checkpoint = open_checkpoint(path)
    model, config = find_model(checkpoint.config)
    params = load_params(model, config, checkpoint, dtype=np.float32, device_put=lambda leaf, spec: jnp.asarray(leaf))
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    hidden, _ = model.forward(params, config, jnp.asarray(tokens), positions, jnp.zeros(()), attention.dense)
    return np.asarray(model.logits(params, config, hidden))


@pytest.mark.parametrize("body", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("name", "ctx"), [("llama2", 128), ("llama2", 130), ("qwen2_window", 201), ("qwen3", 64), ("mistral", 9)]
)
def test_a_chunk_in_steps_is_scored_as_one_sequence(monkeypatch, name, ctx, body):
    """Steps of 64: of two halves, of 1 token at the end, of a rest, one step. Chunks do not see each other."""
    monkeypatch.setattr(evaluate, "STEP_TOKENS", 64)
    path = GOLDENS / name
    model = loaded(path, body)
    vocab = model.config.vocab
    evaluator = Evaluator([model], ctx)
    for seed in (0, 1):
        chunk = np.random.default_rng(seed).integers(0, vocab, ctx).astype(np.int32)
        logits = dense_logits(path, chunk)[ctx // 2 : ctx - 1]
        want = oracle(logits, logits, chunk[ctx // 2 + 1 :])[0]
        found = evaluator.score(chunk)
        assert found.kl is None and found.nll.shape == (ctx - 1 - ctx // 2,)
        np.testing.assert_allclose(found.nll, want, rtol=1e-4, atol=1e-4)


def mild_model(path, kind):
    """A GGUF model whose distributions are broad: the weights of `gguf_files`, smaller."""
    tensors = {name: w * (0.15 if w.ndim == 2 else 1) for name, w in model_tensors().items()}
    return write_model(path, tensors=tensors, kind=kind)


@pytest.mark.parametrize(("body", "tolerance"), [("reference", 1e-4), ("cpu", 0.05)])
def test_a_quantised_model_beside_its_original(tmp_path, body, tolerance):
    """Equal to numpy's figures; the C++ kernels round activations to bytes, and stay near."""
    original, small = mild_model(tmp_path / "f32.gguf", "F32"), mild_model(tmp_path / "q4.gguf", "Q4_0")
    chunk = np.random.default_rng(0).integers(0, 12, 64).astype(np.int32)
    found = Evaluator([loaded(small, body), loaded(original, body)], 64).score(chunk)
    logits = [dense_logits(path, chunk)[32:63] for path in (small, original)]
    nll, base, kl, same = oracle(*logits, chunk[33:])
    assert kl.min() > 0 and 1e-3 < kl.mean() < 1
    np.testing.assert_allclose(found.nll, nll, atol=tolerance)
    np.testing.assert_allclose(found.reference_nll, base, atol=tolerance)
    np.testing.assert_allclose(found.kl, kl, atol=tolerance)
    assert np.mean(found.same_top != same) <= (0 if body == "reference" else 0.05)
    assert found.kl.min() > 0


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_a_model_beside_itself(tmp_path, kind):
    path = mild_model(tmp_path / "model.gguf", kind)
    chunk = np.random.default_rng(0).integers(0, 12, 64).astype(np.int32)
    found = Evaluator([loaded(path, "auto"), loaded(path, "auto")], 64).score(chunk)
    assert not found.kl.any() and found.same_top.all() and np.array_equal(found.nll, found.reference_nll)


def test_scores_are_those_that_serving_gives():
    chunk = np.random.default_rng(0).integers(0, 2048, 200).astype(np.int32)
    found = Evaluator([loaded(Path(EMBEDDED), "auto")], 200).score(chunk)
    with LLM(max_num_seqs=2, max_num_batched_tokens=64, num_kv_pages=32, max_model_len=256, warmup="lazy") as llm:
        served = llm.score([chunk[:101].tolist()], [chunk[101:].tolist()])[0].token_logprobs
    np.testing.assert_allclose(-found.nll, served, atol=1e-5, rtol=1e-5)


def test_logits_of_a_few_positions_are_in_memory_at_once(tmp_path):
    vocab, positions = 16384, 1024
    tensors = model_tensors() | {
        n: np.zeros((vocab, WIDTH), np.float32) for n in ("token_embd.weight", "output.weight")
    }
    path = write_model(tmp_path / "wide.gguf", tensors=tensors, metadata={"context_length": positions})
    evaluator = Evaluator([loaded(path, "auto"), loaded(path, "auto")], positions)
    temporary = evaluator._step.memory_analysis().temp_size_in_bytes
    assert temporary < 512 * vocab * 4, "less than one model's logits of one step"


def test_weights_that_give_no_numbers_are_told(tmp_path):
    tensors = load_file(GOLDENS / "llama2" / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDENS / "llama2" / "config.json").read_text())
    model, chunk = loaded(tmp_path), np.arange(16, dtype=np.int32)
    with pytest.raises(CheckpointError, match="the model gives log-probabilities that are no numbers"):
        Evaluator([model], 16).score(chunk)
    with pytest.raises(CheckpointError, match="the reference gives"):
        Evaluator([loaded(GOLDENS / "llama2"), model], 16).score(chunk)


def test_models_that_do_not_fit_are_refused():
    llama2, llama3 = GOLDENS / "llama2", GOLDENS / "llama3"
    check_models([llama2], 256)
    with pytest.raises(ConfigError, match="ctx_size 257 exceeds the 256 positions of .*llama2; give --ctx-size 256"):
        check_models([llama2], 257)
    with pytest.raises(ConfigError, match="vocabulary of 176 tokens and .*llama2 one of 163; give the model that"):
        check_models([llama2, llama3], 256)


# --- transformers' figures ---


@pytest.mark.parametrize("name", ["stories260K", "babyllama361"])
def test_perplexities_are_those_of_transformers_in_float32(shared_data, capsys, tmp_path, name):
    """To four digits: of a sliding window, and of llama-perplexity's chunks."""
    golden = json.loads((GOLDENS / "score.json").read_text())["shared"][name]["wikitext"]
    text = tmp_path / "wiki.txt"
    text.write_bytes((shared_data / "eval/wikitext-2/test.txt").read_bytes()[: golden["bytes"]])
    path = shared_data / "models" / name
    ctx = json.loads((path / "config.json").read_text())["max_position_embeddings"]
    for kind, flags in (("stride", [f"--stride={ctx // 2}"]), ("chunks", [])):
        assert cli.call(["perplexity", str(path), str(text), f"-c={ctx}", *flags, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["ppl"]["value"]
        assert found == pytest.approx(golden["perplexity"][kind], rel=1e-4), kind


# --- llama.cpp's figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "ctx", "count", "ppl", "tolerance"),
    [
        ("babyllama361/babyllama361-f32.gguf", 256, 8, 89.1089, 2e-4),
        ("babyllama361/babyllama361-Q4_0.gguf", 256, 8, 93.9948, 2e-3),
        ("stories260K/stories260K-Q8_0.gguf", 512, 4, 423.5667, 2e-3),
    ],
)
def test_perplexities_are_llama_perplexitys(shared_data, capsys, tmp_path, model, ctx, count, ppl, tolerance):
    """What `llama-perplexity -f FILE -c CTX --chunks COUNT` prints of 60,000 bytes; its cache is float16."""
    text = tmp_path / "wiki.txt"
    text.write_bytes((shared_data / "eval/wikitext-2/test.txt").read_bytes()[:60000])
    argv = ["perplexity", str(shared_data / "models" / model), str(text), f"-c={ctx}", f"--chunks={count}"]
    assert cli.call([*argv, "--kv-cache-dtype=float16"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.split()[2]) == pytest.approx(ppl, rel=tolerance)


def test_divergences_are_llama_perplexitys(shared_data, capsys, tmp_path):
    """Of eight chunks. Not its PPL(base): what its file of logits keeps of a distribution ends at e^-16 of the best."""
    text = tmp_path / "wiki.txt"
    text.write_bytes((shared_data / "eval/wikitext-2/test.txt").read_bytes()[:60000])
    folder = shared_data / "models/babyllama361"
    argv = ["perplexity", str(folder / "babyllama361-Q4_0.gguf"), str(text), "-c=256", "--chunks=8", "--json"]
    assert cli.call([*argv, "--kl-divergence", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["chunks"], found["scored_tokens"]) == (8, 8 * 127)
    for name, value, error in [
        ("kl", 0.11234, 0.00594),
        ("delta_p_rms", 0.09718, 0.00566),
        ("same_top", 0.75295, 0.01354),
    ]:
        assert found[name]["value"] == pytest.approx(value, rel=0.02), name
        assert found[name]["error"] == pytest.approx(error, rel=0.05), name


def test_llama_perplexitys_own_file_is_read_and_ours_is_as_it_writes(shared_data, capsys, tmp_path):
    """The golden is what `llama-perplexity -c 64 --chunks 2 --kl-divergence-base` writes of 3,000 bytes."""
    text, ours = tmp_path / "wiki.txt", tmp_path / "ours.logits"
    text.write_bytes((shared_data / "eval/wikitext-2/test.txt").read_bytes()[:3000])
    model = str(shared_data / "models/babyllama361/babyllama361-f32.gguf")
    theirs = LogitsFile(GOLDENS / "babyllama361.logits")
    assert (theirs.ctx_size, theirs.vocab, theirs.tokens.shape) == (64, 361, (2, 64))
    argv = ["perplexity", model, str(text), "-c=64", "--chunks=2", "--json", "--kv-cache-dtype=float16"]
    assert cli.call([*argv, "--save-all-logits", str(ours)]) == 0
    assert ours.stat().st_size == theirs.path.stat().st_size
    mine = LogitsFile(ours)
    np.testing.assert_array_equal(mine.tokens[:, 1:], theirs.tokens[:, 1:])
    for i in range(2):
        a, b = mine.rows(i), theirs.rows(i)
        logp, want = (r.scale[:, None] * r.numbers + r.lowest[:, None] for r in (a, b))
        np.testing.assert_allclose(logp, want, atol=0.02)  # float16 caches that round apart
    capsys.readouterr()
    assert cli.call(["perplexity", model, "--kl-divergence-base", str(theirs.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scored_tokens"] == 2 * 31 and found["text"] is None and found["ctx_size"] == 64
    assert abs(found["kl"]["value"]) < 1e-4 and found["same_top"]["value"] > 0.95
    rows, words = [theirs.rows(i) for i in range(2)], theirs.tokens[:, 33:]  # each predicted by the token before it
    logp = [r.scale * r.numbers[np.arange(31), w] + r.lowest for r, w in zip(rows, words, strict=True)]
    assert found["reference_ppl"]["value"] == pytest.approx(math.exp(-np.mean(logp)), rel=1e-5)


def test_a_comparison_by_file_is_nearly_that_by_model(capsys, tmp_path, text):
    argv, file = ["perplexity", EMBEDDED, text, "--ctx-size=64", "--chunks=2"], str(tmp_path / "base.logits")
    assert cli.call([*argv, "--save-all-logits", file]) == 0
    assert os.listdir(tmp_path).count("base.logits.part") == 0
    capsys.readouterr()
    found = []
    for reference in (["--kl-divergence", EMBEDDED], ["--kl-divergence-base", file]):
        assert cli.call([*argv, *reference, "--quantization=q4_0", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    whole, kept = found
    for name in ("reference_ppl", "kl", "delta_p_rms"):
        assert kept[name]["value"] == pytest.approx(whole[name]["value"], rel=0.01), name
    assert kept["same_top"] == whole["same_top"] and kept["kl"]["value"] > 1e-3
    assert kept["reference"] == file and kept["text"] == text
    assert cli.call(["perplexity", EMBEDDED, "--kl-divergence-base", file, "--chunks=1"]) == 0, "no text, fewer chunks"


def test_a_file_of_logits_that_does_not_fit_is_refused(capsys, tmp_path, text):
    tokens = np.full((2, 64), 5)
    rows = Rows(np.zeros((31, 7), np.uint16), np.ones(31, np.float32), np.zeros(31, np.float32))
    file = tmp_path / "x.logits"

    def write(tokens, vocab):
        with LogitsWriter(file, tokens, vocab) as out:
            for _ in tokens:
                out.add(Rows(np.resize(rows.numbers, (31, vocab)), rows.scale, rows.lowest))

    base = ["--kl-divergence-base", str(file)]
    assert "cannot read" in refused(capsys, EMBEDDED, *base)
    write(tokens, 7)
    assert "of a vocabulary of 7 tokens and the model has 2048; give" in refused(capsys, EMBEDDED, *base)
    assert "has chunks of 64 tokens, not 128" in refused(capsys, EMBEDDED, *base, "-c=128")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert f"has {len(whole) - 1} bytes, and its 2 chunks need {len(whole)}" in refused(capsys, EMBEDDED, *base)
    file.write_bytes(b"_logits_")
    assert "is no file of logits; write one with --save-all-logits" in refused(capsys, EMBEDDED, *base)
    write(tokens, 2048)
    assert "is of another text" in refused(capsys, EMBEDDED, text, *base)
    assert "chunks must be at least 1" in refused(capsys, EMBEDDED, *base, "--chunks=0")
    write(np.full((1, 64), 2048), 2048)
    assert "a token is not in its vocabulary of 2048" in refused(capsys, EMBEDDED, *base)
    assert "TEXT is missing" in refused(capsys, EMBEDDED)
    assert "holds chunks, not windows; leave stride out" in refused(capsys, EMBEDDED, *base, "--stride=8")
    assert "are two runs; leave one out" in refused(capsys, EMBEDDED, text, *base, "--kl-divergence", EMBEDDED)
    assert "are two runs; leave one out" in refused(capsys, EMBEDDED, text, *base, "--save-all-logits=y")
    assert "cannot write" in refused(capsys, EMBEDDED, text, "-c=64", "--save-all-logits=/absent/y")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(
        "The capital of France is Paris. Seven plus five is twelve. Once upon a time there was a cat.\n" * 12
    )
    return str(path)


def test_the_command_prints_running_and_final_figures(capsys, text):
    assert cli.call(["perplexity", EMBEDDED, text, "--ctx-size=64", "--chunks=3"]) == 0
    running, last = capsys.readouterr().out.splitlines()
    steps = [float(part.split("]")[1]) for part in running.rstrip(",").split(",")]
    assert running.startswith("[1]") and ",[2]" in running and len(steps) == 3
    assert last.startswith(f"PPL = {steps[-1]:.4f} +/- ") and 1 < steps[-1] < 100
    assert cli.call(["perplexity", EMBEDDED, text, "--ctx-size=64", "--stride=48", "--chunks=3", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert "3 windows of 64 tokens" in shown.err and found["stride"] == 48
    assert found["scored_tokens"] == 63 + 2 * 48 and 1 < found["ppl"]["value"] < 100


def test_the_command_compares(capsys, text):
    argv = ["perplexity", EMBEDDED, text, "--ctx-size=64", "--chunks=2", "--kl-divergence", EMBEDDED]
    assert cli.call(argv) == 0
    out = capsys.readouterr().out
    assert "PPL / reference PPL     1.000000 +/- 0.000000" in out and "same                100.000 +/- 0.000 %" in out
    assert out.splitlines()[-1].startswith("PPL = ")
    assert cli.call([*argv, "--quantization=q8_0", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["reference"] == EMBEDDED and found["ctx_size"] == 64 and found["scored_tokens"] == 62
    assert found["kl"]["value"] > 1e-5 and found["kl_percentiles"]["50.0"] > 0 and found["same_top"]["value"] > 0.5
    assert found["ppl"]["value"] / found["reference_ppl"]["value"] == pytest.approx(found["ratio"]["value"])
    assert "same top %" in shown.err and shown.err.count("+/-") == 2 * 5


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.call(["perplexity", *argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_input_is_told_with_the_cure(capsys, tmp_path, text):
    assert "stride must be in [1, 63]" in refused(capsys, EMBEDDED, text, "-c=64", "--stride=64")
    assert "cannot read " in refused(capsys, EMBEDDED, str(tmp_path / "absent"), "-c=64")
    assert "cannot read " in refused(capsys, EMBEDDED, str(tmp_path), "-c=64")
    (tmp_path / "latin").write_bytes(b"caf\xe9 " * 999)
    assert "is not UTF-8 at byte 3" in refused(capsys, EMBEDDED, str(tmp_path / "latin"))
    assert "lower --ctx-size to" in refused(capsys, EMBEDDED, text, "-c=512")
    assert "exceeds the 2048 positions" in refused(capsys, EMBEDDED, text, "-c=4096")
    assert "no such file" in refused(capsys, EMBEDDED, text, "-c=64", "--kl-divergence=absent.gguf")
    assert "one of 2048; give the model" in refused(
        capsys, EMBEDDED, text, "-c=64", "--kl-divergence", str(GOLDENS / "llama2")
    )
    assert "--max-model-len" in refused(capsys, EMBEDDED, text, "--max-model-len=64")
    assert "this runs one replica only; give 1x1" in refused(capsys, EMBEDDED, text, "-c=64", "--mesh=2x1")
    assert "mesh 1x64 needs 64 devices, found " in refused(capsys, EMBEDDED, text, "-c=64", "--mesh=1x64")


def test_a_reference_of_other_words_is_refused(capsys, tmp_path, text):
    other = tmp_path / "other"
    other.mkdir()
    for name in os.listdir(EMBEDDED):
        (other / name).symlink_to(Path(EMBEDDED, name))
    tokenizer = json.loads(Path(EMBEDDED, "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    (first, i), (second, j) = [(w, words[w]) for w in ("Ġcapital", "ĠFrance") if w in words] or sorted(words.items())[
        -2:
    ]
    words |= {first: j, second: i}
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = refused(capsys, EMBEDDED, text, "-c=64", "--kl-divergence", str(other))
    assert f"token {min(i, j)} is " in said and "for the reference; give the model that was quantised" in said
