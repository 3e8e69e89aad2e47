"""Finds what a model name means: the embedded model, a local directory or GGUF file, or a Hugging Face id."""

import importlib.resources
import re
from pathlib import Path

from jaxserve.errors import ConfigError
from jaxserve.gguf import find_gguf

_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")
# The filters also match inside subdirectories, which hold other formats; consolidated* repeats the weights.
_UNWANTED = ("*/*", "consolidated*")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pth", ".pt", ".onnx", ".msgpack", ".h5")


def resolve_model(model: str | None, revision: str | None = None) -> Path:
    """Where `model` lies: None is the embedded model, then an existing directory or GGUF file, then a Hugging Face id.

    An id is downloaded with huggingface_hub, whose cache, progress bar and environment (HF_ENDPOINT, HF_HOME,
    HF_HUB_OFFLINE, HF_TOKEN) are used as they are; files that are already complete are not fetched again.
    `revision` is a branch, tag or commit of an id. Raises ConfigError with the cure.
    """
    if model is None:
        return _embedded(revision)
    path = Path(model).expanduser()
    if path.is_dir() and model:
        if revision is not None:
            raise ConfigError(f"revision {revision!r} needs a Hugging Face id; {model} is a directory")
        return path
    if path.is_file():
        if find_gguf(path) is None:
            raise ConfigError(f"{model} is no GGUF file; give one, or the directory of config.json and the weights")
        if revision is not None:
            raise ConfigError(f"revision {revision!r} needs a Hugging Face id; {model} is a file")
        return path
    if model.lower().endswith(".gguf"):
        raise ConfigError(f"no such file: {model}")
    if model.startswith((".", "/", "~")):
        raise ConfigError(f"no such directory: {model}")
    if not _ID.fullmatch(model):
        raise ConfigError(f"no such directory, and not a Hugging Face id ([namespace/]name): {model!r}")
    return _download(model, revision)


def _embedded(revision: str | None) -> Path:
    if revision is not None:
        raise ConfigError(f"revision {revision!r} needs a Hugging Face id; the embedded model has none")
    path = Path(str(importlib.resources.files("jaxserve").joinpath("embedded")))
    if not (path / "config.json").is_file():
        raise ConfigError("this installation lacks the embedded model; reinstall jaxserve or name a MODEL")
    return path


def _download(model: str, revision: str | None) -> Path:
    import huggingface_hub as hf  # half a second to import, and not needed for a directory

    try:
        path = Path(
            hf.snapshot_download(model, revision=revision, allow_patterns=[*_WANTED], ignore_patterns=[*_UNWANTED])
        )
    except Exception as error:  # transport errors come from whichever HTTP library huggingface_hub is built on
        raise ConfigError(_explain(model, revision, error)) from error
    if not any(path.glob("*.safetensors")):
        raise ConfigError(f"{model} holds no safetensors{_instead(model, revision)}; name a repository that does")
    return path


def _explain(model: str, revision: str | None, error: Exception) -> str:
    """What a failed download means for the user, and what to do about it."""
    from huggingface_hub import constants, errors

    at = f"{model} at revision {revision!r}" if revision else model
    if isinstance(error, errors.HFValidationError):
        return f"no such directory, and not a Hugging Face id ([namespace/]name): {model!r}"
    if isinstance(error, errors.GatedRepoError):
        return f"{model} is gated: accept its terms at {constants.ENDPOINT}/{model}, then set HF_TOKEN to your token"
    # Mirrors may answer a plain 401 or 403 where the hub itself adds a code.
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            f"no directory and no repository {model} on {constants.ENDPOINT}; "
            "if it is private, set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model} has no revision {revision!r}; give a branch, tag or commit"
    if constants.HF_HUB_OFFLINE:
        fetch = f"hf download {model}" + (f" --revision {revision}" if revision else "")
        return f"{at} is not in the cache and HF_HUB_OFFLINE is set; unset it, or run HF_HUB_OFFLINE=0 {fetch}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{at} is not complete in the cache and {constants.ENDPOINT} did not serve it: {_first_line(error)}; "
            "check the network, HF_ENDPOINT and proxy settings"
        )
    return f"download of {at} failed: {type(error).__name__}: {_first_line(error)}; run it again to go on"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _instead(model: str, revision: str | None) -> str:
    """What weights the repository has instead, where it can be asked."""
    import huggingface_hub as hf

    try:
        names = hf.HfApi().list_repo_files(model, revision=revision)
    except Exception:  # offline, most likely; the message is complete without it
        return ""
    held = [name for name in names if name.lower().endswith(_WEIGHTS)]
    return f"; it has {', '.join(held[:5])}{', ...' if len(held) > 5 else ''}" if held else "; it has no weights"
