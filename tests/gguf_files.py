"""GGUF files for tests: small whole models through the `gguf` package, and files written byte by byte to be wrong."""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACKED = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, LAYERS = 32, 2, 1, 16, 64, 12, 2
EXPERTS = {"expert_count": 3, "expert_used_count": 2}
"""Metadata of a model with experts, whose feed-forward layers are of FFN too."""

METADATA = {
    "context_length": 64,
    "embedding_length": WIDTH,
    "block_count": LAYERS,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10_000.0,
    "rope.dimension_count": HEAD_DIM,
}
"""Of a model whose sizes are the constants above, without the architecture before the key."""


def model_tensors(architecture: str = "llama", *, tied: bool = False, experts: bool = False) -> dict[str, np.ndarray]:
    """Random float32 weights under GGUF's names, as many as the architecture has; `experts`: as EXPERTS says."""
    rng = np.random.default_rng(0)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, WIDTH)
    for i in range(LAYERS):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (WIDTH,), "attn_q.weight": (q, WIDTH), "attn_k.weight": (kv, WIDTH),
            "attn_v.weight": (kv, WIDTH), "attn_output.weight": (WIDTH, q), "ffn_norm.weight": (WIDTH,),
            "ffn_gate.weight": (FFN, WIDTH), "ffn_up.weight": (FFN, WIDTH), "ffn_down.weight": (WIDTH, FFN),
        }  # fmt: skip
        if architecture == "qwen2":
            block |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if architecture.startswith("gemma"):
            block |= {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
        if experts:
            count = EXPERTS["expert_count"]
            for name in ("ffn_gate", "ffn_up", "ffn_down"):
                del block[f"{name}.weight"]
            block |= {
                "ffn_gate_inp.weight": (count, WIDTH), "ffn_gate_exps.weight": (count, FFN, WIDTH),
                "ffn_up_exps.weight": (count, FFN, WIDTH), "ffn_down_exps.weight": (count, WIDTH, FFN),
            }  # fmt: skip
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            block |= {"attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
        if architecture == "olmo2":
            block = {
                name: shape for name, shape in block.items() if name not in ("attn_norm.weight", "ffn_norm.weight")
            }
            block |= {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
            block |= {"attn_q_norm.weight": (q,), "attn_k_norm.weight": (kv,)}
        if architecture == "phi3":
            block |= {"attn_qkv.weight": (q + 2 * kv, WIDTH), "ffn_up.weight": (2 * FFN, WIDTH)}
            parts = ("attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_gate.weight")
            block = {name: shape for name, shape in block.items() if name not in parts}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_model(
    path: Path,
    architecture: str = "llama",
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
    kind: str = "F32",
    split: int = 0,
) -> Path:
    """A model of METADATA's sizes, its matrices of type `kind`, through the `gguf` package.

    `metadata` adds keys, with the architecture where they have no other prefix; None takes one away. `split` tensors
    go to a file: the path that is returned is the first's.
    """
    import gguf

    tensors = model_tensors(architecture) if tensors is None else tensors
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_name("tiny")
    prefixes = ("general.", "tokenizer.", f"{architecture}.")
    for key, value in (METADATA | dict(metadata or {})).items():
        key = key if key.startswith(prefixes) else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    packed = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        if kind == "F32" or tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, packed), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not split:
        return path
    return next(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """The bytes of a value; an array's content is (kind of its elements, elements)."""
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        of, elements = content
        return struct.pack("<IQ", of, len(elements)) + b"".join(value(of, e) for e in elements)
    return struct.pack("<" + PACKED[kind], content)


def entry(key: str | bytes, kind: int, content: Any) -> bytes:
    """One key of the metadata and its value, as `content` or, if that is bytes, as they are."""
    packed = content if isinstance(content, bytes) and kind != STRING else value(kind, content)
    return string(key) + struct.pack("<I", kind) + packed


def tensor(name: str | bytes, dims: Iterable[int], code: int, offset: int) -> bytes:
    """One entry of the list of tensors; `dims` in the file's order, the row's length first."""
    dims = list(dims)
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def file_bytes(
    entries: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
    magic: bytes = b"GGUF",
) -> bytes:
    """A file of these parts. `counts` (tensors, entries) may deny how many there are."""
    entries, tensors = list(entries), list(tensors)
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(entries))))
    head += b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
