"""Finds what a model name means: the embedded model, a local directory or GGUF file, or a Hugging Face id."""

import glob
import importlib.resources
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from jaxserve.config import DEFAULT_MODEL_NAME
from jaxserve.errors import ConfigError
from jaxserve.gguf import SHARD, find_gguf

_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_HOST = re.compile(r"(?:hf\.co|huggingface\.co)/(?=.+/)")
_GGUF = re.compile(r"(?P<id>[^/:]+/[^/:]+)(?::(?P<kind>[\w.-]+)|/(?P<file>[^:]+\.gguf))", re.IGNORECASE)
_DEFAULT_KIND = "Q4_K_M"
"""As llama.cpp and Ollama take where none is named."""
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")
# The filters also match inside subdirectories, which hold other formats; consolidated* repeats the weights.
_UNWANTED = ("*/*", "consolidated*")
_POOLING = "*_Pooling/config.json"
"""How sentence-transformers pools, where a repository is one of its: the one file in a subdirectory that is read."""
_CONFIGS = ("config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""What tells a model's sizes and its use, the first one always."""
_OTHER_SIZES = "download it, or name the repository that it was made from"
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pth", ".pt", ".onnx", ".msgpack", ".h5")


def resolve_model(model: str | None, revision: str | None = None, *, weights: bool = True) -> Path:
    """Where `model` lies: None is the embedded model, then an existing directory or GGUF file, then a Hugging Face id.

    The embedded model's name is that of it, too, where nothing else is called so here.

    An id `org/repo` means safetensors, and in a repository of GGUF files alone its Q4_K_M, or its only one;
    `org/repo:Q8_0` the GGUF file of that kind, `org/repo/path/file.gguf` that file, of a split all; `hf.co/` may stand
    before each of them. What is not here is downloaded with huggingface_hub, whose cache, progress bar and environment
    (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN) are used as they are; files that are already complete are not
    fetched again. `revision` is a branch, tag or commit of an id. Without `weights` no more of an id is downloaded than
    what tells the model's sizes, and a config.json alone will do. Raises ConfigError with the cure.
    """
    if model is None:
        return _embedded(revision)
    path = Path(model).expanduser()
    if path.is_dir() and model:
        if revision is not None:
            raise ConfigError(f"revision {revision!r} needs a Hugging Face id; {model} is a directory")
        return path
    if path.is_file():
        if find_gguf(path) is None and (weights or path.suffix != ".json"):
            raise ConfigError(f"{model} is no GGUF file; give one, or the directory of config.json and the weights")
        if revision is not None:
            raise ConfigError(f"revision {revision!r} needs a Hugging Face id; {model} is a file")
        return path
    if model == DEFAULT_MODEL_NAME:
        return _embedded(revision)
    local = model.startswith((".", "/", "~"))
    name = _HOST.sub("", model, count=1)
    wanted = None if local else _GGUF.fullmatch(name)
    if wanted is not None and _ID.fullmatch(wanted["id"]):
        if not weights:
            raise ConfigError(f"{model}: a GGUF file tells its sizes when it is here; {_OTHER_SIZES}")
        return _download_gguf(wanted["id"], wanted["kind"], wanted["file"], revision)
    if model.lower().endswith(".gguf"):
        raise ConfigError(f"no such file: {model}")
    if local:
        raise ConfigError(f"no such directory: {model}")
    if not _ID.fullmatch(name):
        raise ConfigError(f"no such directory, and not a Hugging Face id ([namespace/]name[:kind]): {model!r}")
    return _download(name, revision) if weights else _download_config(name, revision)


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
        if (path / "modules.json").is_file():
            hf.snapshot_download(model, revision=revision, allow_patterns=[_POOLING])
    except Exception as error:  # transport errors come from whichever HTTP library huggingface_hub is built on
        raise ConfigError(_explain(model, revision, error)) from error
    if any(path.glob("*.safetensors")):
        return path
    names = _files(model, revision)
    if gguf_models(names):
        return _download_gguf(model, None, None, revision)
    held = [name for name in names if name.lower().endswith(_WEIGHTS)]
    instead = f"it has {_listed(held)}" if held else "it has no weights"
    raise ConfigError(f"{model} holds no safetensors; {instead}; name a repository that does")


def _download_config(model: str, revision: str | None) -> Path:
    import huggingface_hub as hf

    try:
        path = Path(hf.snapshot_download(model, revision=revision, allow_patterns=[*_CONFIGS, _POOLING]))
    except Exception as error:
        raise ConfigError(_explain(model, revision, error)) from error
    if not (path / _CONFIGS[0]).is_file():
        raise ConfigError(f"{model} holds no {_CONFIGS[0]}; {_OTHER_SIZES}")
    return path


def gguf_models(names: Iterable[str]) -> dict[str, list[str]]:
    """The models among a repository's files, without the ending: each one's file, or the files of its split in order.

    Projectors of images, importance matrices and adapters of speculative decoding are no models.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if not name.lower().endswith(".gguf") or re.match(r"(?i)mmproj|imatrix", PurePosixPath(name).name):
            continue
        shard = SHARD.fullmatch(name)
        models.setdefault(shard["stem"] if shard else name[: -len(".gguf")], []).append(name)
    return models


def choose_gguf(repository: str, names: Iterable[str], kind: str | None, file: str | None) -> list[str]:
    """The files of the model that a kind of quantisation means, or a file. Raises ConfigError listing what there is."""
    models = gguf_models(names)
    if not models:
        raise ConfigError(f"{repository} holds no GGUF file of a model")
    held = f"it has {_listed([PurePosixPath(files[0]).name for files in models.values()])}"
    if file is not None:
        found = {model: files for model, files in models.items() if file in files}
        asked = file
    else:
        asked = _DEFAULT_KIND if kind is None or kind.lower() == "latest" else kind
        # A whole word of the name, or the folder that a split lies in.
        word = re.compile(rf"(?:^|[-._/]){re.escape(asked)}(?:$|[-./])", re.IGNORECASE)
        found = {model: files for model, files in models.items() if word.search(model)}
        if not found and asked is not kind and len(models) == 1:
            found = models
    if not found:
        raise ConfigError(f"{repository} holds no {asked}; {held}; name one as {repository}:KIND or {repository}/FILE")
    if len(found) > 1:
        several = _listed([files[0] for files in found.values()])
        raise ConfigError(f"{repository} holds several {asked}: {several}; name one as {repository}/FILE")
    (files,) = found.values()
    shards = [shard for name in files if (shard := SHARD.fullmatch(name))]
    if shards and len(shards) != int(shards[0]["count"]):
        raise ConfigError(
            f"{repository}: of the {int(shards[0]['count'])} shards of {files[0]} {len(shards)} are there"
        )
    return files


def _download_gguf(model: str, kind: str | None, file: str | None, revision: str | None) -> Path:
    """The first file of what was asked for, the others beside it."""
    import huggingface_hub as hf

    files = choose_gguf(model, _files(model, revision), kind, file)
    try:
        patterns = [glob.escape(name) for name in files]
        path = Path(hf.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise ConfigError(_explain(model, revision, error)) from error
    missing = [name for name in files if not (path / name).exists()]
    if missing:  # of a split whose download was broken off, when the hub cannot be asked
        raise ConfigError(f"{model} is not complete in the cache, which lacks {_listed(missing)}; download it again")
    return path / files[0]


def _files(model: str, revision: str | None) -> list[str]:
    """The repository's files; those in the cache where the hub does not answer."""
    import huggingface_hub as hf
    from huggingface_hub import errors

    try:
        # Not list_repo_files, which asks a hub that cannot be reached six times, for half a minute.
        found = hf.HfApi().model_info(model, revision=revision).siblings
        return [file.rfilename for file in found or ()]
    except Exception as error:
        if isinstance(error, (errors.HfHubHTTPError, errors.HFValidationError)):
            raise ConfigError(_explain(model, revision, error)) from error
        try:
            nothing: list[str] = []  # of it is asked for, so that a part of the repository will do
            folder = hf.snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=nothing)
        except Exception as absent:
            raise ConfigError(_explain(model, revision, absent)) from error
        return [file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file()]


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


def _listed(names: list[str]) -> str:
    return ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
