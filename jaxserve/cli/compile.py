"""`jaxserve compile`: every program that a server would compile, kept in a folder for its start to load."""

import shlex
import time
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from jaxserve.cli import options as cli
from jaxserve.cli.progress import reporting
from jaxserve.config import DeviceOptions, ModelOptions, ScheduleOptions
from jaxserve.errors import ConfigError
from jaxserve.hub import resolve_model


@dataclass(frozen=True, kw_only=True)
class DeviceFlags(DeviceOptions):
    """DeviceOptions without what this command decides."""

    warmup: Annotated[Literal["full", "min", "lazy"], Parameter(parse=False)] = "full"
    compile_cache_dir: Annotated[str | None, Parameter(parse=False)] = None


Device = Annotated[DeviceFlags, Parameter(name="*", group=Group("Device", sort_key=3))]


def compile_model(
    *words: str,
    config: cli.ConfigFile = None,
    models: cli.ModelsByFlag = ModelOptions(),
    schedule: cli.Schedule = ScheduleOptions(),
    device: Device = DeviceFlags(),
) -> int:
    """Compile all steps of a model into a folder: `jaxserve compile [MODEL] OUT`, with the flags of the server.

    It runs on the kind of machine that will serve, and needs of the model config.json; where the CPU's kernels are used
    the checkpoint as well, whose headers tell the types of its weights. With --compile-cache-dir OUT and the same flags
    `jaxserve serve` then compiles nothing; what it would have to compile after all it says.

    Parameters
    ----------
    words
        MODEL as `jaxserve serve` takes it, and OUT, the folder to make. Without MODEL: what --model, JAXSERVE_MODEL or
        the file says, else the embedded model.
    config
        TOML file with any of these settings.
    """
    if len(words) not in (1, 2):
        raise ConfigError(f"compile takes MODEL and OUT, or OUT alone; {len(words)} words were given")
    model, out = words[0] if len(words) == 2 else models.model, words[-1]
    from jaxserve.baked import check_target, write_manifest  # which import JAX
    from jaxserve.client.replicas import Replicas, open_engine

    directory = check_target(out)
    path = resolve_model(model, models.revision)
    device = replace(device, compile_cache_dir=str(directory.resolve()))
    options = cli.engine_options(model, models, schedule, device)
    begun = time.monotonic()
    with reporting() as report:
        opened = open_engine(
            options, path, model_name=cli.model_name(model), deliver=lambda deltas: None, progress=report, ahead=True
        )
    engine = opened.engines[0] if isinstance(opened, Replicas) else opened
    served = replace(options.device, warmup=DeviceOptions.warmup, compile_cache_dir=None)
    given = cli.given(replace(options.model, model=None), options.schedule, served)
    write_manifest(directory, engine.runner.made_for(), dict(given))
    files = [p.stat().st_size for p in directory.rglob("*") if p.is_file()]
    print(f"wrote {out}: {len(files)} files, {sum(files) / 1e6:.1f} MB, in {time.monotonic() - begun:.1f} s")
    served = replace(served, compile_cache_dir=out, num_kv_pages=engine.info.num_pages)
    print(f"Serve it:  {shlex.join(cli.serve_words(replace(options, device=served)))}")
    return 0
