"""`jaxserve new-model` and `new-checkpoint`: a model file to start from, and random weights to try it with."""

import re
from pathlib import Path

from jaxserve.errors import ConfigError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def new_model(name: str, path: Path = Path(".")) -> int:
    """Write a commented model file to start from, and a small random checkpoint that it serves.

    Parameters
    ----------
    name
        Of the model: letters, digits, _ and -. The file is NAME.py, the checkpoint NAME-random/.
    path
        Directory to write to; it is made if need be.
    """
    import importlib.resources

    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a model; it takes letters, digits, _ and -, a letter first")
    file = path / f"{name.replace('-', '_')}.py"
    checkpoint = path / f"{name}-random"
    for target in (file, checkpoint):
        if target.exists():
            raise ConfigError(f"{target} exists already; take another name, or remove it")
    template = importlib.resources.files("jaxserve").joinpath("embedded", "new_model.py").read_text(encoding="utf-8")
    text = template.replace("NewModel", "".join(part.capitalize() for part in re.split("[_-]", name)))
    try:
        path.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("new_model", file.stem), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    print(f"wrote {file}: read it from the top, and change what you like")
    new_checkpoint(str(file), checkpoint)
    print(f"Is it still a model?   jaxserve check {file} --checkpoint {checkpoint}")
    print(f"Talk to it (nonsense): jaxserve run {checkpoint} --model-code {file} 'Hello' --max-tokens 20")
    print(f"Serve it:              jaxserve serve {checkpoint} --model-code {file}")
    print(f"Other weights or sizes: edit EXAMPLE, then jaxserve new-checkpoint {file} ANOTHER-DIRECTORY")
    return 0


def new_checkpoint(file: str, path: Path, *, seed: int = 0) -> int:
    """Write a checkpoint of random weights for a model file, sized by its EXAMPLE, with the embedded tokenizer.

    Parameters
    ----------
    file
        Python file or module of the model; it is executed.
    path
        Directory to write; it must not exist.
    seed
        The same seed draws the same weights.
    """
    from jaxserve.model_code import load_model_code
    from jaxserve.random_weights import write_checkpoint

    model = load_model_code(file)
    if model.example is None:
        raise ConfigError(f"{file} has no EXAMPLE: give it one, a dict as a small model's config.json would be")
    count = write_checkpoint(model, model.example, path, seed)
    print(f"wrote {path}: {count / 1e6:.2f} M random weights, config.json from EXAMPLE, the embedded tokenizer")
    return 0
