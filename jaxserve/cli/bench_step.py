"""`jaxserve bench step`: single compiled steps of the engine, timed and taken apart."""

from typing import Annotated

from cyclopts import Parameter, validators

from jaxserve.cli import options as cli
from jaxserve.cli.bench import Count
from jaxserve.cli.progress import reporting
from jaxserve.config import ScheduleOptions

Counts = Annotated[tuple[Count, ...], Parameter(consume_multiple=True, negative=())]


def step(
    model: cli.Model = None,
    *,
    batch_size: Counts = (),
    prefill: Counts = (),
    context: Annotated[int | None, Parameter(validator=validators.Number(gte=0))] = None,
    breakdown: Annotated[bool, Parameter(negative=())] = False,
    num_iters: Count = 20,
    num_iters_warmup: Annotated[int, Parameter(validator=validators.Number(gte=0))] = 3,
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    schedule: cli.Schedule = ScheduleOptions(),
    device: cli.LazyDevice = cli.LazyDeviceFlags(),
) -> int:
    """Milliseconds of single steps in this process, without scheduler and HTTP, and which operations hold them.

    Parameters
    ----------
    model
        Local directory (safetensors or Orbax), GGUF file or Hugging Face id; without it the embedded model is measured.
    batch_size
        Sequences of a step that decodes one token of each; several values are measured one after the other:
        --batch-size 1 16. Default: 1, if no prefill is asked for.
    prefill
        Tokens of a step that computes a piece of one prompt; several values may be given.
    context
        Tokens of each sequence that are in the KV cache before the step. Default: 128 for decoding, 0 for a prefill.
    breakdown
        A table by operation: calls, milliseconds and share of each, from a profile of further steps.
    num_iters
        Steps that are measured, and profiled.
    num_iters_warmup
        Steps that are run before.
    config
        TOML file with any of these settings.
    """
    import jax

    from jaxserve import profile
    from jaxserve.bench import row
    from jaxserve.hub import resolve_model
    from jaxserve.metrics import EngineMetrics
    from jaxserve.runner import Runner

    engine = cli.engine_options(model, models, schedule, device)
    path = resolve_model(engine.model.model, engine.model.revision)
    cases = [profile.Case(n, 1, 128 if context is None else context) for n in batch_size or (() if prefill else (1,))]
    cases += [profile.Case(1, n, context or 0) for n in prefill]
    if breakdown:  # the names of operations, which a cached step has as they were when it was compiled
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    with reporting() as report:
        runner = Runner(engine, path, EngineMetrics(cli.model_name(model)), report)
    try:
        for case in cases:
            print(profile.measure(runner, case, steps=num_iters, warm=num_iters_warmup).table(), flush=True)
            if breakdown:
                print(f"\n{profile.profile(runner, case, steps=num_iters).table()}\n", flush=True)
    finally:
        runner.close()
    print(f"{runner.info.architecture} on {runner.info.platform}, attention {runner.info.attention}")
    if runner.info.platform == "cpu":
        print(row("Memory read by all cores (GB/s):", profile.memory_bandwidth() / 1e9))
    return 0
