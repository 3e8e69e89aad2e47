"""From the dataclasses of config.py to flags, JAXSERVE_* variables and TOML keys.

A flag wins over a variable, a variable over the file, the file over the default.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import App, ArgumentCollection, Group, Parameter
from cyclopts.config import Dict, Env

from jaxserve import config
from jaxserve.config import DeviceOptions, EngineOptions, HostOptions, ModelOptions, ScheduleOptions, ServerOptions
from jaxserve.errors import ConfigError, InvalidParameter
from jaxserve.request import SamplingParams

ENV_PREFIX = "JAXSERVE_"

# Variables that are not options: tracebacks for errors, and the data folder of the test suite.
OTHER_VARIABLES = ("JAXSERVE_DEBUG", "JAXSERVE_DATA")

# A TOML file may be flat or have these sections.
SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "schedule": ScheduleOptions,
    "device": DeviceOptions,
    "hosts": HostOptions,
    "server": ServerOptions,
}


# The options of the sections, and where a file of them is.
OPTIONS = ("config", *config.option_names(*SECTIONS.values()))


@dataclass(frozen=True, kw_only=True)
class ModelFlags(ModelOptions):
    """ModelOptions without `model`, which is the commands' positional argument."""

    model: Annotated[str | None, Parameter(parse=False)] = None


@dataclass(frozen=True, kw_only=True)
class OfflineScheduleFlags(ScheduleOptions):
    """ScheduleOptions for answers that nobody reads as they come."""

    decode_steps: int = config.OFFLINE_DECODE_STEPS
    """Most decode steps that one launch takes, while no prompt can be taken in: more tokens a second, since the host
    works once for all of them."""


@dataclass(frozen=True, kw_only=True)
class LazyDeviceFlags(DeviceOptions):
    """DeviceOptions for somebody who waits for one answer."""

    warmup: Literal["full", "min", "lazy"] = "lazy"
    """Step shapes compiled before the first answer. full: all. min: the largest and the smallest two; the others follow
    in the background. lazy: the largest, which sizes the memory; each other one is compiled when it is first needed."""


@dataclass(frozen=True, kw_only=True)
class WarmDeviceFlags(DeviceOptions):
    """DeviceOptions for a measurement, which compiling must not disturb."""

    warmup: Literal["full", "min", "lazy"] = "full"
    """Step shapes compiled before the measurement. full: all. min: the largest and the smallest two; the others follow
    in the background. lazy: the largest, which sizes the memory; each other one is compiled when it is first needed."""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How to sample. What is not given is taken from the model's generation_config.json."""

    max_tokens: int | None = None
    """Most tokens to generate. Default: what the model says, else up to the end of the context."""
    temperature: float | None = None
    """0 always takes the likeliest token."""
    top_p: float | None = None
    """Sample from the likeliest tokens that hold this much probability."""
    top_k: int | None = None
    """Sample from this many likeliest tokens; 0 is off."""
    min_p: float | None = None
    """Leave out tokens less likely than this share of the likeliest one."""
    repetition_penalty: float | None = None
    """Above 1: tokens that were seen become less likely."""
    presence_penalty: float | None = None
    """Taken from the logit of every token generated before."""
    frequency_penalty: float | None = None
    """Taken from the logit of a token for each time that it was generated before."""
    seed: int | None = None
    """The same seed gives the same tokens."""
    stop: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    """Stop at this text; may be given several times."""
    ignore_eos: bool = False
    """Go on past the end-of-sequence token."""

    def __post_init__(self) -> None:
        try:
            self.params(SamplingParams())
        except InvalidParameter as e:  # a wrong flag, so it is refused before a model is loaded
            raise ConfigError(e.message) from e

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults` with everything that was given. Raises InvalidParameter."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: value for name, value in given.items() if value is not None and value != ()}
        return msgspec.structs.replace(defaults, **given)


Model = Annotated[str | None, Parameter(group=Group("Model", sort_key=1))]
Models = Annotated[ModelFlags, Parameter(name="*", group=Group("Model", sort_key=1))]
ModelsByFlag = Annotated[ModelOptions, Parameter(name="*", group=Group("Model", sort_key=1))]
"""With --model, for commands whose only word may be something else than the model."""
Schedule = Annotated[ScheduleOptions, Parameter(name="*", group=Group("Scheduling", sort_key=2))]
OfflineSchedule = Annotated[OfflineScheduleFlags, Parameter(name="*", group=Group("Scheduling", sort_key=2))]
Device = Annotated[DeviceOptions, Parameter(name="*", group=Group("Device", sort_key=3))]
LazyDevice = Annotated[LazyDeviceFlags, Parameter(name="*", group=Group("Device", sort_key=3))]
WarmDevice = Annotated[WarmDeviceFlags, Parameter(name="*", group=Group("Device", sort_key=3))]
Hosts = Annotated[HostOptions, Parameter(name="*", group=Group("Hosts", sort_key=4))]
Server = Annotated[ServerOptions, Parameter(name="*", group=Group("Server", sort_key=5))]
Sampling = Annotated[SamplingFlags, Parameter(name="*", group=Group("Sampling", sort_key=2))]
ConfigFile = Annotated[Path | None, Parameter(group=Group("Model", sort_key=1))]


model_name = config.model_name


def engine_options(
    model: str | None, rest: ModelOptions, schedule: ScheduleOptions, device: DeviceOptions
) -> EngineOptions:
    """What the engine is given. Model: directory, hub id, or None for the embedded model."""
    return EngineOptions(
        model=ModelOptions(**{f.name: getattr(rest, f.name) for f in fields(ModelOptions)} | {"model": model}),
        schedule=ScheduleOptions(**{f.name: getattr(schedule, f.name) for f in fields(ScheduleOptions)}),
        device=DeviceOptions(**{f.name: getattr(device, f.name) for f in fields(DeviceOptions)}),
    )


def sources() -> tuple[Any, ...]:
    """What fills the flags that were not given, the strongest first; for `cyclopts.App(config=...)`."""
    return (Env(ENV_PREFIX, command=False), read_config_file)


def read_config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fills arguments from the file that `--config` or JAXSERVE_CONFIG names.

    Keys of other commands' options may be there, so that one file serves a whole deployment; any other key raises
    ConfigError.
    """
    argument = arguments.get("--config", None)
    if argument is None or not argument.tokens:
        return
    path = Path(argument.tokens[-1].value)
    here = {name.removeprefix("--").replace("-", "_") for a in arguments if a.parse for name in a.names}
    values = {key: value for key, value in flatten(path, here).items() if key in here}
    Dict(values, source=str(path), use_commands_as_keys=False)(app, commands, arguments)


def flatten(path: Path, more_keys: Iterable[str] = ()) -> dict[str, Any]:
    """A configuration file's keys, its sections opened. `more_keys` are legal at the top besides the options.

    Raises ConfigError naming the file and the key.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"--config {path}: {e.strerror or e}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"--config {path} is not TOML: {e}") from e
    values: dict[str, Any] = {}
    everything = {*OPTIONS, *(f.name for f in fields(SamplingFlags)), *more_keys}
    for key, value in document.items():
        if key in SECTIONS and isinstance(value, dict):
            known = {f.name for f in fields(SECTIONS[key])}
            items = [(name, inner, f"[{key}] {name}") for name, inner in value.items()]
        else:
            known, items = everything - {"config"}, [(key, value, key)]
        for name, inner, shown in items:
            option = name.replace("-", "_")
            if option not in known:
                close = SECTIONS if isinstance(inner, dict) else known
                raise ConfigError(f"--config {path}: unknown key {shown!r}{_suggest(option, close)}")
            if option in values:
                raise ConfigError(f"--config {path}: {shown!r} is given twice")
            if isinstance(inner, dict):
                raise ConfigError(f"--config {path}: {shown!r} must be a value, not a table")
            values[option] = inner
    return values


def unknown_variables(options: Iterable[str], environ: Iterable[str] | None = None) -> list[str]:
    """The JAXSERVE_* variables that name none of `options`, each with what was probably meant."""
    known = {ENV_PREFIX + name.upper() for name in options}
    found = sorted(os.environ if environ is None else environ)
    return [
        name + _suggest(name, known)
        for name in found
        if name.startswith(ENV_PREFIX) and name not in known and name not in OTHER_VARIABLES
    ]


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def serve_words(engine: EngineOptions, *more: object) -> list[str]:
    """`jaxserve serve` with the options of an engine, and those of `more` sections."""
    model = [] if engine.model.model is None else [engine.model.model]
    flags = as_flags(replace(engine.model, model=None), engine.schedule, engine.device, *more)
    return ["jaxserve", "serve", *model, *flags]


def as_flags(*sections: object) -> list[str]:
    """The flags that give another jaxserve process these options."""
    flags: list[str] = []
    for name, value in given(*sections):
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")  # one word: it may be empty, or begin with a dash
    return flags


def given(*sections: object) -> Iterator[tuple[str, Any]]:
    """Names and values of what is not as it would be by itself."""
    for section in sections:
        for f in fields(section):  # type: ignore[arg-type]
            if (value := getattr(section, f.name)) != f.default:
                yield f.name, value
