"""Lets llama.cpp judge what `jaxserve quantize` writes, beside what its own llama-quantize makes of the same weights.

python tools/check_quantize_llama_cpp.py [--source CHECKPOINT] [--types Q4_K_M,Q6_K]

llama-perplexity reads every file, so each one loads there. PPL and the mean Kullback-Leibler divergence of the next
token from that of the BF16 file are over the same text. `formats` says whether all tensors have the formats that
llama-quantize chose, `same` which share of the quantised blocks' bytes is equal.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from llamacpp import build, default_folder
from tiny_corpus import plain_text

from jaxserve.gguf import GgufFile

TYPES = "Q8_0,Q4_0,Q4_1,Q5_0,Q5_1,Q2_K,Q3_K_M,Q4_K_S,Q4_K_M,Q5_K_S,Q5_K_M,Q6_K,IQ4_NL,IQ4_XS,MXFP4"
EMBEDDED = Path(__file__).parent.parent / "jaxserve" / "embedded"
THEIR_MXFP4 = ["--tensor-type", "blk=mxfp4"]  # their type of that name is for experts only


def run(*argv: object) -> str:
    """What a command prints. Raises SystemExit with its end if it fails."""
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(str(a) for a in argv)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def judged(programs: Path, file: Path, text: Path, base: Path) -> tuple[float, float]:
    """Perplexity and mean divergence of a file."""
    options = ["-m", file, "-f", text, "-c", 256, "-t", 2]
    said = run(programs / "llama-perplexity", *options, "--kl-divergence", "--kl-divergence-base", base)
    values = [re.search(rf"^{label}\s*:\s*(-?[\d.]+)", said, re.MULTILINE) for label in (r"Mean PPL\(Q\)", "Mean +KLD")]
    if not all(values):
        raise SystemExit(f"no figures in what llama-perplexity says of {file.name}:\n{said[-3000:]}")
    ppl, divergence = (float(v[1]) for v in values if v)
    return ppl, divergence


def alike(ours: Path, theirs: Path) -> tuple[bool, float]:
    """Whether all formats are equal, and the share of equal bytes in quantised tensors of one format."""
    a, b = GgufFile(ours), GgufFile(theirs)
    if a.tensors.keys() != b.tensors.keys():
        raise SystemExit(f"{ours.name}: other tensors: {sorted(a.tensors.keys() ^ b.tensors.keys())}")
    same = total = 0
    for name, info in a.tensors.items():
        if info.format == b.tensors[name].format and info.format.quantised:
            same += int(np.count_nonzero(a.raw(name) == b.raw(name)))
            total += info.nbytes
    return all(info.format == b.tensors[name].format for name, info in a.tensors.items()), same / max(total, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=EMBEDDED, help="what `jaxserve quantize` can read: %(default)s")
    parser.add_argument("--text", type=Path, help="default: some of what the embedded model was trained on")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--folder", type=Path, default=default_folder(), help="for llama.cpp: %(default)s")
    args = parser.parse_args()
    programs = build(args.folder)
    with tempfile.TemporaryDirectory() as scratch:
        full, base, text = (Path(scratch, name) for name in ("BF16.gguf", "base.kld", "text"))
        r = random.Random(99)
        text.write_text(args.text.read_text() if args.text else "\n\n".join(plain_text(r) for _ in range(150)))
        quantize = [sys.executable, "-m", "jaxserve", "quantize"]
        run(*quantize, args.source, full, "BF16")
        said = run(programs / "llama-perplexity", "-m", full, "-f", text, "-c", 256, "-t", 2,
                   "--kl-divergence-base", base)  # fmt: skip
        print("BF16:", next(line for line in said.splitlines() if "Final estimate" in line).split("estimate: ")[-1])
        print(f"{'type':8}{'PPL ours':>10}{'theirs':>10}{'KLD ours':>12}{'theirs':>10}{'formats':>9}{'same':>8}")
        for kind in args.types.split(","):
            ours, theirs = (Path(scratch, f"{kind}-{side}.gguf") for side in ("ours", "theirs"))
            run(*quantize, full, ours, kind)
            options, their_kind = (THEIR_MXFP4, "Q8_0") if kind == "MXFP4" else ([], kind)
            run(programs / "llama-quantize", *options, full, theirs, their_kind)
            figures = [judged(programs, file, text, base) for file in (ours, theirs)]
            formats, same = alike(ours, theirs)
            ppl, divergence = ("".join(f"{f[i]:10.4f}" for f in figures) for i in (0, 1))
            print(f"{kind:8}{ppl}  {divergence}{'equal' if formats else 'differ':>9}{same:8.1%}", flush=True)


if __name__ == "__main__":
    main()
