"""Small GGUF models whose blocks are random bytes: every bit of a format is in use, and no quantiser has a say."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.formats import FORMATS
from jaxserve.weights.gguf_write import TensorToWrite, write_gguf

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, LAYERS = 256, 4, 2, 64, 512, 272, 2

# Where a block has its scale (float16; MXFP4 an exponent of one byte) and how large that is, for weights of about
# 1/16; then, where the block has a second one, its place and its size as a multiple of the first's, so that the
# weights' mean is about 0.
_SCALES: dict[str, tuple[int, float, int | None, float]] = {
    "Q8_0": (0, 8.5e-4, None, 0.0),
    "Q4_0": (0, 1.35e-2, None, 0.0),
    "Q4_1": (0, 1.35e-2, 2, -7.5),
    "Q5_0": (0, 6.8e-3, None, 0.0),
    "Q5_1": (0, 6.8e-3, 2, -15.5),
    "Q2_K": (80, 4.5e-3, 82, 1.5),
    "Q3_K": (108, 1.47e-3, None, 0.0),
    "Q4_K": (0, 1.8e-4, 2, 7.5),
    "Q5_K": (0, 8.8e-5, 2, 15.5),
    "Q6_K": (208, 4.5e-5, None, 0.0),
    "IQ4_NL": (0, 9e-4, None, 0.0),
    "IQ4_XS": (0, 4.9e-5, None, 0.0),
    "MXFP4": (0, 0.0, None, 0.0),
}
TYPES = tuple(_SCALES)


def _bits(count: int, seed: int) -> np.ndarray:
    """uint8 [count], the same for the same seed with every version of numpy."""
    return np.random.PCG64(seed).random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


def random_uniform(count: int, seed: int) -> np.ndarray:
    """float64 [count] in [0, 1)."""
    return (np.random.PCG64(seed).random_raw(count) >> np.uint64(11)) * 2.0**-53


def random_rows(name: str, rows: int, k: int, seed: int) -> np.ndarray:
    """uint8 [rows, row_bytes]: random blocks of a format with scales that keep a model's numbers near 1."""
    format = FORMATS[name]
    count = rows * k // format.block
    blocks = _bits(count * format.nbytes, seed).reshape(count, format.nbytes).copy()
    vary = random_uniform(2 * count, seed + 1).reshape(2, count) + 0.5
    at, scale, second, ratio = _SCALES[name]
    if second is None:  # real files have negative scales too
        vary[0] *= np.where(vary[1] < 1, -1, 1)
    if name == "MXFP4":
        blocks[:, at] = 120 + blocks[:, at] % 4
    else:
        blocks[:, at : at + 2] = _half(scale * vary[0])
    if second is not None:
        blocks[:, second : second + 2] = _half(ratio * scale * (0.9 * vary[0] + 0.1 * vary[1]))
    return blocks.reshape(rows, -1)


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype("<f2")[:, None].view(np.uint8)


def metadata() -> dict[str, Any]:
    """Of a Llama of this module's sizes with a SentencePiece vocabulary of bytes."""
    special, byte = ["<unk>", "<s>", "</s>"], [f"<0x{b:02X}>" for b in range(256)]
    words = [f"▁{letter}" for letter in "abcdefghijklm"]
    return {
        "general.architecture": "llama",
        "general.name": "random blocks",
        "llama.context_length": 512,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": special + byte + words,
        "tokenizer.ggml.scores": np.arange(0, -VOCAB, -1, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(words), np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor, outputs first."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,), "output.weight": (VOCAB, WIDTH),
    }  # fmt: skip
    for i in range(LAYERS):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (WIDTH,), "attn_q": (q, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH),
            "attn_output": (WIDTH, q), "ffn_norm": (WIDTH,), "ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH),
            "ffn_down": (WIDTH, FFN),
        }  # fmt: skip
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    return found


def write_random_model(path: Path, name: str) -> str:
    """A whole model, all its matrices in one of TYPES; the sha256 of its tensors' bytes, in order."""
    digest = hashlib.sha256()
    tensors = []
    for i, (tensor, shape) in enumerate(shapes().items()):
        if len(shape) == 1:
            kind, raw = "F32", (0.5 + random_uniform(shape[0], 100 * i)).astype("<f4")[None].view(np.uint8)
        else:
            kind, raw = name, random_rows(name, shape[0], shape[1], 100 * i)
        digest.update(raw.tobytes())

        def rows(raw: np.ndarray = raw) -> Iterable[np.ndarray]:
            return [raw]

        tensors.append(TensorToWrite(tensor, FORMATS[kind], shape, rows))
    write_gguf(path, metadata(), tensors)
    return digest.hexdigest()
