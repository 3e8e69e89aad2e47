"""More than one engine, on Ray: batch.py is an offline job on Ray Data, serving.py are replicas on Ray Serve.

    placement.py    how many engines there are, and what each gets
    worker.py       an engine in a process of Ray's

Ray itself is in the extra `ray`, and imported by batch.py and serving.py only.
"""

from typing import Any


def app(args: dict[str, Any]) -> Any:
    """The application for `serve run jaxserve.ray:app model=... max_replicas=4`; see serving.build."""
    from jaxserve.ray.serving import build

    return build(args)
