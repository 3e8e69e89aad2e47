"""Writes tests/goldens/gguf_blocks, gguf_gemma and gguf_families: what llama.cpp computes with small random models.

python tools/golden_gguf.py [--folder FOLDER]

The models are made again wherever they are needed: only their hashes are kept. For each prompt there are
log-probabilities of the next token, over the whole vocabulary.

gguf_blocks: tests/gguf_blocks.py's models of random blocks, one for each format. `logprobs` are from the quantised
file: for its products llama.cpp rounds activations to 8 bits, so these are no exact target. `exact` are from the same
weights as float32, which llama-quantize made of the file: what a computation in float32 must give, to 1e-4.

gguf_gemma, gguf_families: the checkpoints of tests/gemma_files.py and family_files.py as `jaxserve quantize` writes
them in F32, which llama.cpp has to load. `exact` is as above, `ids` is how llama.cpp cuts each of `texts`.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
from llamacpp import build, default_folder, free_port, running, server_argv, version

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import family_files  # noqa: E402
import gemma_files  # noqa: E402
from gguf_blocks import TYPES, VOCAB, write_random_model  # noqa: E402

PROMPT_LENGTHS = (1, 7, 40)
WHOLE = 271  # a token of letters in every vocabulary here
TEXTS = ["", "a", " a", "a new town", "  two   lines\n\n\nand\n\na <table>", "naïve 你好", "x <end_of_turn> y <bos>"]


def prompts(bos: int = 1, vocab: int = VOCAB) -> list[list[int]]:
    """Token ids that are no specials, after the first, which begins a text."""
    rng = np.random.default_rng(7)
    return [[bos, *(int(t) for t in rng.integers(bos + 2, vocab, n - 1))] for n in PROMPT_LENGTHS]


async def asked(
    programs: Path, model: Path, prompts: list[list[int]], vocab: int, texts: Sequence[str] = ()
) -> tuple[np.ndarray, list[list[int]]]:
    """Of llama-server, whose cache is float32 here: float64 [prompts, vocab], and the ids of each text."""
    port = free_port()
    options = ["-t", 2, "-c", 512, "-np", 1, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-warmup"]
    found = np.full((len(prompts), vocab), np.nan)
    async with running(server_argv(programs, model, port, *options), port) as server, httpx.AsyncClient() as client:
        for _ in range(600):
            try:
                if (await client.get(f"{server.url}/health")).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)
        for row, prompt in zip(found, prompts, strict=True):
            # Probabilities are from before the bias, which chooses a whole character: of a part of one it says nothing.
            bias = [[WHOLE, 1000.0]]
            body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": vocab, "logit_bias": bias}
            answer = await client.post(f"{server.url}/completion", json=body, timeout=60)
            (token,) = answer.raise_for_status().json()["completion_probabilities"]
            for candidate in token["top_logprobs"]:
                row[candidate["id"]] = candidate["logprob"]
        ids = []
        for text in texts:
            body = {"content": text, "add_special": False, "parse_special": False}
            answer = await client.post(f"{server.url}/tokenize", json=body, timeout=60)
            ids.append(answer.raise_for_status().json()["tokens"])
    if not np.isfinite(found).all():
        raise SystemExit(f"{model.name}: llama-server gave no log-probability of {np.isnan(found).sum()} tokens")
    return found, ids


def rounded(rows: np.ndarray) -> list[list[float]]:
    return [[round(p, 5) for p in row] for row in rows.tolist()]


def blocks(programs: Path, types: list[str], *, write: bool) -> None:
    goldens = ROOT / "tests" / "goldens" / "gguf_blocks"
    goldens.mkdir(exist_ok=True)
    print(f"{'type':8} {'largest difference of 8 bit activations':>40} {'largest logprob':>16}")
    for name in types:
        with tempfile.TemporaryDirectory() as scratch:
            model, dense = Path(scratch, f"{name}.gguf"), Path(scratch, "F32.gguf")
            digest = write_random_model(model, name)
            command = [str(a) for a in (programs / "llama-quantize", "--allow-requantize", model, dense, "F32")]
            subprocess.run(command, check=True, capture_output=True)
            found, exact = (asyncio.run(asked(programs, path, prompts(), VOCAB))[0] for path in (model, dense))
        print(f"{name:8} {np.abs(found - exact).max():40.4f} {exact.max():16.4f}", flush=True)
        if write:
            golden = {"type": name, "tensors_sha256": digest, "llama_cpp": version(programs), "prompts": prompts()}
            golden |= {"logprobs": rounded(found), "exact": rounded(exact)}
            (goldens / f"{name}.json").write_text(json.dumps(golden) + "\n")


def checkpoints(programs: Path, files: ModuleType, goldens: Path) -> None:
    goldens.mkdir(exist_ok=True)
    for name in files.CONFIGS:
        with tempfile.TemporaryDirectory() as scratch:
            model, checkpoint = Path(scratch, f"{name}.gguf"), Path(scratch, "checkpoint")
            digest = files.write_checkpoint(checkpoint, name)
            command = [sys.executable, "-m", "jaxserve", "quantize", str(checkpoint), str(model), "F32"]
            subprocess.run(command, check=True, capture_output=True)
            vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
            given = prompts(2, vocab)
            exact, ids = asyncio.run(asked(programs, model, given, vocab, TEXTS))
        print(f"{name:12} largest logprob {exact.max():.4f}", flush=True)
        golden = {"tensors_sha256": digest, "llama_cpp": version(programs), "prompts": given, "exact": rounded(exact)}
        (goldens / f"{name}.json").write_text(json.dumps(golden | {"texts": TEXTS, "ids": ids}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=default_folder(), help="for llama.cpp: %(default)s")
    parser.add_argument(
        "--types", default=",".join(TYPES), help="only these, which are printed and not written; none: the others only"
    )
    args = parser.parse_args()
    programs = build(args.folder)
    whole = args.types == parser.get_default("types")
    blocks(programs, args.types.split(",") if args.types else [], write=whole)
    if whole or not args.types:
        checkpoints(programs, gemma_files, ROOT / "tests" / "goldens" / "gguf_gemma")
        checkpoints(programs, family_files, ROOT / "tests" / "goldens" / "gguf_families")


if __name__ == "__main__":
    main()
