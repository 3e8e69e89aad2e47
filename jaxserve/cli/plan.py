"""`jaxserve plan`: what a model would need on devices that are not here, whether it fits, how fast it could be."""

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from jaxserve.cli import options as cli
from jaxserve.cli.progress import reporting
from jaxserve.config import DeviceOptions, EngineOptions, ScheduleOptions
from jaxserve.errors import ConfigError
from jaxserve.planning.chips import accepted
from jaxserve.planning.topology import Topology, check_compiler, environment

if TYPE_CHECKING:
    from jaxserve.planning.planner import Report
    from jaxserve.planning.steps import Step

MISFIT = 1

Topologies = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]


def plan(
    model: cli.Model = None,
    *,
    topology: Topologies = (),
    sweep: Annotated[bool, Parameter(negative=())] = False,
    context: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    schedule: cli.Schedule = ScheduleOptions(),
    device: cli.Device = DeviceOptions(),
) -> int:
    """Compile a model's steps for TPUs or GPUs that need not be here: memory, what fits, messages, speed at best.

    The options are those of `jaxserve serve`. No weight is read, of a Hugging Face id nothing but its config.json
    downloaded. The exit code is 1 if the model does not fit.

    Parameters
    ----------
    model
        Local directory or its config.json, GGUF file, or Hugging Face id; without it the embedded model is planned.
    topology
        Devices, as v5e:2x4, v5p:2x2x2, h100:8, or cpu:8 to try it out; with --sweep any number of them.
    sweep
        A table of every mesh of all devices of each topology, --mesh apart.
    context
        Tokens of each user in the KV cache, where speed is estimated. Default: 1024.
    as_json
        Print JSON on standard output; what is done meanwhile is said on standard error.
    config
        TOML file with any of these settings, flat or in the sections [model], [schedule], [device].
    """
    where = [Topology.parse(text) for text in topology]
    if not where:
        raise ConfigError(f"give --topology; known are {accepted()}")
    if len(where) > 1 and not sweep:
        raise ConfigError(f"--topology names {len(where)}: give one, or --sweep to compare them")
    for each in where:
        check_compiler(each)
    engine = cli.engine_options(model, models, schedule, device)
    with tempfile.TemporaryDirectory() as logs:
        if "jax" not in sys.modules:  # else it has its devices already
            cpus = max((each.count for each in where if each.chip.platform == "cpu"), default=0)
            os.environ.update(environment(Path(logs), cpus))
        reports = _reports(engine, where, sweep, context)
    if as_json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(reports if sweep else reports[0]), indent=2).decode())
    else:
        print("\n".join(table(reports) if sweep else lines(reports[0])))
    return 0 if any(report.fits for report in reports) else MISFIT


def _reports(engine: EngineOptions, where: list[Topology], sweep: bool, context: int | None) -> "list[Report]":
    import msgspec

    from jaxserve.hub import resolve_model
    from jaxserve.planning import planner

    path = resolve_model(engine.model.model, engine.model.revision, weights=False)
    found = []
    with reporting() as report:
        for topology in where:
            meshes = [str(shape) for shape in planner.every_mesh(topology)] if sweep else [engine.device.mesh]
            for mesh in meshes:
                one = replace(engine, device=replace(engine.device, mesh=mesh))
                try:
                    planned = planner.plan(one, path, topology, context=context or planner.CONTEXT, progress=report)
                except ConfigError as error:
                    if not sweep:
                        raise
                    print(f"{topology}, mesh {mesh}: {error.message}", file=sys.stderr)
                    continue
                found.append(msgspec.structs.replace(planned, command=_command(one, path)) if planned.fits else planned)
    return found


def _command(engine: EngineOptions, path: Path) -> str:
    """What to start; MODEL stands for the checkpoint where only a config.json was given."""
    model = replace(engine.model, model="MODEL") if path.suffix == ".json" else engine.model
    return shlex.join(cli.serve_words(replace(engine, model=model)))


def lines(report: "Report") -> Iterator[str]:
    """A plan for people."""
    gib = 2**30
    chip, replicas = report.chip, f"{report.devices} devices" if report.devices > 1 else "1 device"
    yield f"{report.model}: {report.architecture}, {report.num_params / 1e9:.2f} B parameters, {report.dtype}"
    hosts = f" on {report.hosts} hosts" if report.hosts > 1 else ""
    yield f"  on         {report.topology}{hosts}, mesh {report.mesh} ({replicas}), attention {report.attention}"
    sizes = " + ".join(f"{kind} {size / gib:.2f}" for kind, size in report.device_bytes.items() if size)
    total = sum(report.device_bytes.values())
    yield f"  a device   {sizes} = {total / gib:.2f} of {report.memory / gib:.2f} GiB"
    if report.problem:
        yield f"  DOES NOT FIT: {report.problem}"
        yield f"  would fit  with {report.cure}" if report.cure else "  no change that is known here would make it fit"
    if report.kv_pages:
        yield (
            f"  KV cache   {report.kv_cache_dtype}, {report.kv_pages} pages of {report.page_size} tokens a replica: "
            f"{report.kv_tokens} tokens in sequences of {report.max_model_len}"
        )
    for step in report.steps:
        yield f"  step       {_step(step)}"
        for c in step.collectives:
            yield f"             {c.count} {c.kind} in {c.part}, {c.bytes / 2**20:.2f} MiB"
    if report.messages_per_block is not None and report.devices > 1:
        yield f"  messages   {report.messages_per_block:g} a block and step"
    if report.decode or report.prefill:
        from jaxserve.planning.estimate import FORMULA, LEFT_OUT

        yield (
            f"  at best    {FORMULA}; a device has {chip['bytes_per_second'] / 1e9:.0f} GB/s and "
            f"{_peak(report) / 1e12:.0f} TFLOP/s ({chip['source']})"
        )
        for e in report.decode:
            yield (
                f"             decode {e.users} users, context {e.context}: {e.tokens_per_second:,.0f} tokens/s, "
                f"{1e3 * e.seconds:.2f} ms a step, {e.bytes / 1e9:.2f} GB, {e.flops / 1e9:.1f} GFLOP ({e.bound})"
            )
        if p := report.prefill:
            yield (
                f"             prefill {p.context} tokens: {p.tokens_per_second:,.0f} tokens/s, "
                f"{1e3 * p.seconds:.2f} ms a step, {p.bytes / 1e9:.2f} GB, {p.flops / 1e9:.1f} GFLOP ({p.bound})"
            )
        yield f"             {LEFT_OUT}"
    yield f"  compiled   {len(report.steps)} steps in {report.compile_seconds:.1f} s; nothing was run"
    if report.command:
        yield f"  start it   {report.command}"


def _peak(report: "Report") -> float:
    return report.chip["float32_flops" if report.dtype == "float32" else "bf16_flops"]


def _step(step: "Step") -> str:
    by_xla = (
        f", by XLA's count {step.flops / 1e9:.1f} GFLOP and {step.bytes_accessed / 1e9:.2f} GB without our kernels"
        if step.flops is not None and step.bytes_accessed is not None
        else ""
    )
    return (
        f"{step.tokens} tokens, {step.seqs} sequences: workspace {step.workspace / 2**20:.1f} MiB, code "
        f"{step.code / 2**20:.1f} MiB, {step.updated / 2**20:.0f} MiB updated in place{by_xla}, {step.seconds:.1f} s"
    )


def table(reports: "list[Report]") -> Iterator[str]:
    """Plans side by side, a line each."""
    line = "{:<14} {:<6} {:>11} {:>11} {:>12} {:>10} {:>12} {:>12} {:>12} {:>9}".format
    yield line(
        "topology", "mesh", "weights GiB", "steps GiB", "KV tokens", "messages", "1 user t/s", "most t/s", "prefill",
        "seconds",
    )  # fmt: skip
    for r in reports:
        weights = f"{r.device_bytes['weights'] / 2**30:.2f}"
        if not r.fits:
            yield f"{r.topology:<14} {r.mesh:<6} {weights:>11} does not fit" + (
                f"; would with {r.cure}" if r.cure else ""
            )
            continue
        one, most = (f"{e.tokens_per_second:,.0f}" for e in (r.decode[0], r.decode[-1])) if r.decode else ("-", "-")
        yield line(
            r.topology,
            r.mesh,
            weights,
            f"{r.device_bytes['workspace'] / 2**30:.2f}",
            f"{r.kv_tokens:,}",
            f"{r.messages_per_block:g}",
            one,
            most,
            f"{r.prefill.tokens_per_second:,.0f}" if r.prefill else "-",
            f"{r.compile_seconds:.1f}",
        )
    yield "Tokens of KV and messages a block are of a replica, tokens a second of all of them, at best."
