"""The command line: the only reader of the environment and, but for its first word, of argv.

Heavy imports happen inside the commands.
"""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Group, Parameter

from jaxserve import __version__
from jaxserve.cli import options
from jaxserve.cli.streams import with_dashes_as_paths
from jaxserve.engine_process import EngineProcess
from jaxserve.errors import CheckpointError, ConfigError, JaxserveError
from jaxserve.gpu_memory import pool_variables

USAGE = 2
FAILURE = 1
INTERRUPTED = 130

COMMANDS = {
    "serve": "serve:serve",
    "run": "run:run",
    "generate": "generate:generate",
    "batch": "batch:batch",
    "compile": "compile:compile_model",
    "convert": "convert:convert",
    "quantize": "quantize:quantize",
    "show": "show:show",
    "plan": "plan:plan",
    "check": "check:check",
    "new-model": "new_model:new_model",
    "new-checkpoint": "new_model:new_checkpoint",
    "perplexity": "perplexity:perplexity",
    "score": "score:score_file",
    "doctor": "doctor:doctor",
    "version": "doctor:version",
}
STREAMING = ("generate", "score")
"""Those whose files may be -."""
BENCHES = {
    "throughput": "bench:throughput",
    "latency": "bench:latency",
    "serve": "bench:serve",
    "startup": "bench:startup",
    "step": "bench_step:step",
}


def make_app() -> App:
    """The command tree. Flags are spelt as in `--help`; each is also JAXSERVE_<NAME> and a key of a --config file."""
    app = App(
        name="jaxserve",
        help="Serve large language models with JAX on CPU, GPU and TPU.",
        help_epilogue="Each option may also be given as an environment variable (JAXSERVE_PORT=9000) "
        "or as a key of a --config file (port = 9000); a flag wins over a variable over the file.",
        version=__version__,
        config=options.sources(),
        group_parameters=Group("Options", sort_key=0),
        default_parameter=Parameter(show_env_var=False),
    )
    bench = App(
        name="bench",
        help="Measure throughput, latency, a running server, the start, or a single step.",
        group_parameters=Group("Options", sort_key=0),
    )
    # Named, not imported: a command pays for its own imports only.
    for name, target in COMMANDS.items():
        app.command(f"jaxserve.cli.{target}", name=name)
    for name, target in BENCHES.items():
        bench.command(f"jaxserve.cli.{target}", name=name)
    app.command(bench)
    return app


def main(argv: Sequence[str], begun: EngineProcess | None = None) -> None:
    """Runs a command and exits: 0 done, 1 failed, 2 wrong usage, configuration or checkpoint, 130 interrupted.

    `batch` also exits with 3: done, and some rows have an error for an answer.
    """
    os.environ.update(pool_variables())  # the process is ours, and in most commands the engine's
    try:
        code = call(argv, begun)
    finally:
        if begun is not None:
            begun.dismiss()
    sys.exit(code)


def call(argv: Sequence[str], begun: EngineProcess | None = None) -> int:
    """Runs a command; its exit code. `begun` is for a command that has such a parameter.

    An error that the user can cure is a message on stderr; with JAXSERVE_DEBUG=1 it is a traceback.
    """
    app = make_app()
    if argv and argv[0] in STREAMING:
        argv = with_dashes_as_paths(argv)
    # A variable may also be an option of a single command, and help lists every command: both need all of them.
    if options.unknown_variables(options.OPTIONS) or list(argv) in ([], ["bench"]) or {"-h", "--help"} & set(argv):
        for name in options.unknown_variables(_every_option(app)):
            print(f"jaxserve: warning: unknown environment variable {name}", file=sys.stderr)
    try:
        command, bound, ours = app.parse_args(list(argv), exit_on_error=False, print_error=False)
        code = command(*bound.args, **bound.kwargs, **({"begun": begun} if "begun" in ours else {}))
        return code if isinstance(code, int) else 0
    except (CycloptsError, JaxserveError) as e:
        if os.environ.get("JAXSERVE_DEBUG", "0") not in ("", "0"):
            raise
        if isinstance(e, CycloptsError):
            e.verbose = False
        print(f"jaxserve: {e}", file=sys.stderr)
        return USAGE if isinstance(e, CycloptsError | ConfigError | CheckpointError) else FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone, as `head` does; what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


def _every_option(app: App) -> set[str]:
    """The names of all options of all commands, as the fields are called."""
    names: set[str] = set()
    for name in app:
        if name.startswith("-"):
            continue
        command = app[name]
        names |= _every_option(command)
        if command.default_command:
            arguments = command.assemble_argument_collection(parse_docstring=False)
            names |= {n.lstrip("-").replace("-", "_") for argument in arguments for n in argument.names}
    return names
