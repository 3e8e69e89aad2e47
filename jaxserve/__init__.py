"""The public names of jaxserve, and its version; importing it loads no JAX until `LLM` is used."""

from typing import TYPE_CHECKING, Any

from jaxserve.errors import JaxserveError
from jaxserve.request import SamplingParams

if TYPE_CHECKING:
    from jaxserve.batch_job import BatchResult, run_batch
    from jaxserve.llm import LLM, RequestOutput

__version__ = "0.1.0"
__all__ = ["LLM", "BatchResult", "JaxserveError", "RequestOutput", "SamplingParams", "__version__", "run_batch"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "RequestOutput"):
        from jaxserve import llm

        return getattr(llm, name)
    if name in ("BatchResult", "run_batch"):  # `jaxserve.batch` is the module that packs a step's arrays
        from jaxserve import batch_job

        return getattr(batch_job, name)
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
