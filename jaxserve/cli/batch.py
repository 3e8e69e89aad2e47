"""`jaxserve batch`: a file of requests in, a file of answers out; stopped or killed, it goes on when run again."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter, validators

from jaxserve.batch_job import BatchOptions, Compute, Running, in_one_engine, run_job
from jaxserve.batch_job.store import Store
from jaxserve.cli import INTERRUPTED
from jaxserve.cli import options as cli
from jaxserve.cli.opening import opened, run
from jaxserve.cli.progress import RowProgress
from jaxserve.config import DeviceOptions, EngineOptions, RayOptions
from jaxserve.errors import ConfigError
from jaxserve.hub import resolve_model

SOME_FAILED = 3


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(cli.SamplingFlags):
    """SamplingFlags for rows that do not say."""

    seed: int = 0
    """Rows without a seed get one made from this, the input and their place in it."""


Sampling = Annotated[SamplingFlags, Parameter(name="*", group=Group("Sampling, where a row does not say", sort_key=2))]
Ray = Annotated[RayOptions, Parameter(name="*", group=Group("With --engine ray", sort_key=4))]


def batch(
    input: str,
    output: str,
    model: cli.Model = None,
    *,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    max_errors: Annotated[int | None, Parameter(validator=validators.Number(gte=0))] = None,
    raw: bool = False,
    column: str | None = None,
    capture: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    work_dir: Path = Path(),
    served_model_name: str | None = None,
    engine: Literal["local", "ray"] = "local",
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    sampling: Sampling = SamplingFlags(),
    schedule: cli.OfflineSchedule = cli.OfflineScheduleFlags(),
    device: cli.Device = DeviceOptions(),
    ray: Ray = RayOptions(),
) -> int:
    """Answer a file of requests, each exactly once. Stopped or killed at any moment, the same command goes on.

    The input is OpenAI's batch format (.jsonl; chat and text completions, embeddings, scores), a column of prompts or
    messages (.parquet, .arrow), or a prompt a line (any other suffix). The output is in the order of the input: records
    of OpenAI's batch output (.jsonl), or the input's columns and those of the answers. A bad row gets a record with its
    error. Exit code: 0 all answered; 3 all done, some with an error; 1 stopped before the end; 130 interrupted.

    Parameters
    ----------
    input
        File or glob; with fsspec also gs://, s3://, hf:// and others.
    output
        File to write: .jsonl, .parquet or .arrow, here or remote. What resuming needs lies beside it, in OUTPUT.job.
    model
        Local directory (safetensors or Orbax), GGUF file or Hugging Face id; without it the embedded model answers.
    overwrite
        Replace an output that another job has written. The same job is resumed all the same.
    max_errors
        Stop when more rows than this have failed.
    raw
        Continue bare prompts as they are. Otherwise each is a user's message, if the model has a chat template. A model
        of embeddings embeds them in any case.
    column
        Column of the prompts or messages. Default: messages, else prompt.
    capture
        Also write what the model computes inside, for every token, into Arrow files in OUTPUT.capture/: the name of a
        value, or a pattern: `layers.*.mlp`, `layers.3.*`, embed, hidden. May be given several times; one that matches
        nothing is answered with the names that there are.
    work_dir
        Where an output that is remote is prepared.
    served_model_name
        Name that rows use for the model. Default: the directory's name or the hub id.
    engine
        local: one process of this machine. ray: engines on a Ray cluster, or several on this machine, for the same
        output; each machine must have this jaxserve and find the model under the same name.
    config
        TOML file with any of these settings, flat or in the sections [model], [schedule], [device].
    """
    settings = replace(cli.engine_options(model, models, schedule, device), capture=capture)
    if capture and engine == "ray":
        raise ConfigError("--capture is served with --engine local only; leave one of the two out")
    if capture:
        print("capturing: every position is computed, without prefix cache, one decode step a launch", file=sys.stderr)
    name = cli.model_name(model, served_model_name)
    given = {f.name: getattr(sampling, f.name) for f in fields(sampling) if f.name != "seed"}
    job = BatchOptions(
        input=input,
        output=output,
        overwrite=overwrite,
        max_errors=max_errors,
        raw=raw,
        column=column,
        seed=sampling.seed,
        given={
            k: list(v) if k == "stop" else v for k, v in given.items() if v is not None and v is not False and v != ()
        },
        work_dir=work_dir,
    )
    compute = _on_ray(ray) if engine == "ray" else _here(settings, name, ray)
    path = resolve_model(model, models.revision)
    try:
        result = run(run_job(job, settings, path, name, compute))
    except asyncio.CancelledError:  # by a second Ctrl-C
        print("stopped; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    if not result.complete:
        print(f"stopped after {result.rows} rows; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    failed = f", {result.failed} of them with an error" if result.failed else ""
    print(f"{output} is complete: {result.rows} rows{failed}", file=sys.stderr)
    return SOME_FAILED if result.failed else 0


def _here(settings: EngineOptions, name: str, ray: RayOptions) -> Compute:
    for option in fields(ray):
        if getattr(ray, option.name) is not None:
            raise ConfigError(f"--{option.name.replace('_', '-')} is for --engine ray; leave it out, or give that too")
    return in_one_engine(lambda: opened(settings, name, in_process=False), _watched)


def _on_ray(options: RayOptions) -> Compute:
    from jaxserve.ray.batch import on_ray

    address = options.ray_address or os.environ.get("RAY_ADDRESS") or None
    return on_ray(replace(options, ray_address=address), _watched)


@contextlib.asynccontextmanager
async def _watched(job: Running, store: Store, rows: int) -> AsyncIterator[None]:
    """Shows how far the job is; a first SIGINT or SIGTERM lets it finish what is in flight, a second cancels it."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def interrupted() -> None:
        if job.stopping:
            task.cancel()
            return
        print(job.stop(), file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    if store.finished:
        print(f"going on after {store.finished} rows", file=sys.stderr)
    try:
        with RowProgress(rows) as shown:
            showing = asyncio.create_task(_show(shown, store))
            try:
                yield
            finally:
                showing.cancel()
                shown.update(store.finished, store.failed, store.tokens)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    if job.ignored:
        names = ", ".join(sorted(job.ignored)[:10])
        print(f"warning: fields that nothing here knows were ignored: {names}", file=sys.stderr)


async def _show(shown: RowProgress, store: Store) -> None:
    while True:
        shown.update(store.finished, store.failed, store.tokens)
        await asyncio.sleep(0.5)
