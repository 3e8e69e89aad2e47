"""Offline throughput of several decode steps a launch beside the serving loop's one, in turn in one process.

    python tools/bench_offline.py
    python tools/bench_offline.py MODEL --batch-size 16 --steps 8 --output-len 64

Each round gives every engine the same prompts, through LLM.generate, and all must give the same tokens. Host CPU is
that of this process's Python threads: the loops of the engine and of its reader. XLA's threads are the device.
"""

import argparse
import os
import statistics
import threading
import time
from dataclasses import dataclass, field

from jaxserve import LLM, SamplingParams
from jaxserve.bench import Sample, Workload
from jaxserve.config import OFFLINE_DECODE_STEPS


@dataclass
class Measured:
    """An engine of `steps` decode steps a launch, and its rounds."""

    llm: LLM
    steps: int
    rates: list[float] = field(default_factory=list)
    """Tokens/s."""
    host_us: list[float] = field(default_factory=list)
    """Microseconds of host CPU a token."""
    cpu_us: list[float] = field(default_factory=list)
    """The same of the whole process, the device's threads included."""

    def round(self, samples: list[Sample]) -> list[list[int]]:
        """Has the samples answered, measured; their tokens."""
        prompts = [s.prompt_token_ids for s in samples]
        params = [SamplingParams(max_tokens=s.output_tokens, temperature=0.0, ignore_eos=True) for s in samples]
        host, cpu, begun = python_cpu_s(), time.process_time(), time.perf_counter()
        outputs = self.llm.generate(prompts, params, progress=False)
        elapsed, host, cpu = time.perf_counter() - begun, python_cpu_s() - host, time.process_time() - cpu
        tokens = [output.outputs[0].token_ids for output in outputs]
        count = sum(map(len, tokens))
        self.rates.append(count / elapsed)
        self.host_us.append(1e6 * host / count)
        self.cpu_us.append(1e6 * cpu / count)
        return tokens


def python_cpu_s() -> float:
    """CPU seconds of this process's Python threads so far."""
    clocks = [time.pthread_getcpuclockid(t.ident) for t in threading.enumerate() if t.ident is not None]
    return sum(map(time.clock_gettime, clocks))


def spread(values: list[float], digits: int) -> str:
    """Smallest, median and largest."""
    return " ".join(f"{v:>9.{digits}f}" for v in (min(values), statistics.median(values), max(values)))


def main() -> None:
    """Opens the engines, runs the rounds, prints a line an engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="as `jaxserve serve` takes it; without it the embedded model")
    parser.add_argument("--steps", type=int, nargs="+", default=[OFFLINE_DECODE_STEPS], help="to compare with 1")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, help="in a round; default: two batches")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--range-ratio", type=float, default=0.0, help="lengths vary by this share, up and down")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--attention", default="auto")
    args = parser.parse_args()

    engines = []
    for steps in (1, *args.steps):
        llm = LLM(args.model, decode_steps=steps, max_num_seqs=args.batch_size, warmup="full", attention=args.attention)
        engines.append(Measured(llm, steps))
    for number in range(args.rounds + 1):
        workload = Workload(
            input_len=args.input_len,
            output_len=args.output_len,
            num_prompts=args.num_prompts or 2 * args.batch_size,
            range_ratio=args.range_ratio,
            vocab_size=engines[0].llm.info.vocab_size,
            seed=number,
        )
        samples = workload.samples()
        turns = engines if number % 2 else engines[::-1]
        tokens = [engine.round(samples) for engine in turns]
        assert all(other == tokens[0] for other in tokens), "the engines do not say the same"
        if number == 0:  # a warm-up
            for engine in engines:
                engine.rates.clear(), engine.host_us.clear(), engine.cpu_us.clear()
        else:
            print(f"round {number}, tokens/s:", *(f"{e.steps}: {e.rates[-1]:.0f}" for e in engines), flush=True)
    print(
        f"{args.rounds} rounds of {len(samples)} prompts, {args.input_len} tokens in, {args.output_len} out, varied by "
        f"{args.range_ratio:g}; batch {args.batch_size}; load {' '.join(f'{n:.1f}' for n in os.getloadavg())}"
    )
    print(
        f"{'steps':>5}  {'tokens/s: min, median, max':>29}  {'over one step':>29}  {'host us of CPU a token':>29}  all"
    )
    for engine in engines:
        ratios = [a / b for a, b in zip(engine.rates, engines[0].rates, strict=True)]
        print(
            f"{engine.steps:>5}  {spread(engine.rates, 0)}  {spread(ratios, 2)}  {spread(engine.host_us, 1)}  "
            f"{statistics.median(engine.cpu_us):.0f}"
        )
        engine.llm.close()


if __name__ == "__main__":
    main()
