"""`jaxserve`, which is `python -m jaxserve`: begins what takes longest, and then reads the command line."""

import sys

from jaxserve.engine_process import EngineProcess

NOT_SERVED = {"-h", "--help", "--in-process"}


def main() -> None:
    """The command. See cli/__init__.py."""
    words = sys.argv[1:]
    begun = EngineProcess() if words[:1] == ["serve"] and NOT_SERVED.isdisjoint(words) else None
    from jaxserve import cli

    cli.main(words, begun)


if __name__ == "__main__":
    main()
