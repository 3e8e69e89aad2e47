"""Loads a model that lies outside the package, by path or module name, by executing it. No config, no weights.

What goes wrong in such a file is somebody's next edit: every error names the file and the line.
"""

import ast
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.spec import Model

_PREFIX = "model_code."
"""Of the names that files get in sys.modules, so that none hides a module of its own name."""
_ARGUMENTS = {"param_specs": ("config",), "forward": ("params", "config", "tokens", "positions", "cache", "attend")} | {
    "logits": ("params", "config", "hidden")
}


def load_model_code(code: str) -> "Model":
    """The model of PATH.py[:NAME] or module[:NAME]. The code is executed, with its directory importable.

    NAME is an object of the file with Config, param_specs, forward and logits; without it the file itself has them.
    Raises ConfigError saying where: the file cannot be read or run, or lacks something.
    """
    from jaxserve.spec import Model  # and with it JAX, which whoever asks for a digest does without

    source, name = _split(code)
    module = _run_file(Path(source).expanduser()) if _is_path(source) else _import(source, code)
    found: Any = module
    for part in name.split(".") if name else ():
        if not hasattr(found, part):
            have = (
                ", ".join(n for n in vars(found) if not n.startswith("_")) if hasattr(found, "__dict__") else "nothing"
            )
            raise ConfigError(f"model_code: {source} has no {name!r}; it has {have}")
        found = getattr(found, part)
    try:
        model = Model.of(found, name=name or module.__name__.rsplit(".", 1)[-1])
    except ConfigError as error:
        inner = [n for n, value in vars(module).items() if not n.startswith("_") and _is_model(value)]
        cure = f"; say {source}:{inner[0]}" if inner and not name else ""
        raise ConfigError(f"model_code: {code}: {error.message}{cure}") from error
    for function, arguments in _ARGUMENTS.items():
        _check_arguments(getattr(model, function), function, arguments)
    return model


def code_file(code: str) -> Path | None:
    """The file of PATH.py[:NAME]; None for a module's name."""
    source, _ = _split(code)
    return Path(source).expanduser() if _is_path(source) else None


def code_digest(code: str) -> str:
    """A digest of the file that `load_model_code` would run; what that imports is not in it.

    Raises ConfigError when there is no such file.
    """
    path, _ = _found(code)
    return _digest(code, [path], path.parent)


def sources_digest(code: str | None) -> str:
    """The same of the file and of what it imports that lies beside it, on and on; what is installed is not in it.

    None is the package's own model, which its version tells: "of jaxserve".
    """
    if code is None:
        return "of jaxserve"
    path, beside = _found(code)
    return _digest(code, [path, *_imported(path, beside)], beside)


def _found(code: str) -> tuple[Path, Path]:
    """The file of PATH.py[:NAME] or module[:NAME], and the folder that it imports from."""
    source, _ = _split(code)
    if _is_path(source):
        path = Path(source).expanduser()
        return path, path.parent
    _importable(Path.cwd())
    try:
        found = importlib.util.find_spec(source)
    except ImportError:
        found = None
    if found is None or found.origin is None:
        raise ConfigError(f"model_code: {code!r} is no file and no module")
    path = Path(found.origin)
    return path, path.parents[source.count(".") + (path.name == "__init__.py")]


def _digest(code: str, files: list[Path], beside: Path) -> str:
    digest = hashlib.blake2b(_split(code)[1].encode(), digest_size=10)
    for i, file in enumerate(files):
        try:
            # The first may be called what one likes.
            digest.update(f"\0{file.relative_to(beside) if i else ''}\0".encode() + file.read_bytes())
        except OSError as error:
            raise ConfigError(f"model_code: cannot read {file}: {error.strerror}") from error
    return digest.hexdigest()


def _imported(path: Path, beside: Path) -> list[Path]:
    """The files under `beside` that a file imports, and those that these import; without itself."""
    found, waiting = {path}, [path]
    while waiting:
        file = waiting.pop()
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):  # running it will say what is wrong
            continue
        for folder, name in _imports(tree, file, beside):
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                module = folder.joinpath(*parts[:end])
                for other in (module.with_name(f"{module.name}.py"), module / "__init__.py"):
                    if other not in found and other.is_relative_to(beside) and other.is_file():
                        found.add(other)
                        waiting.append(other)
    return sorted(found - {path})


def _imports(tree: ast.AST, file: Path, beside: Path) -> Iterator[tuple[Path, str]]:
    """Each dotted name that may be a module, and the folder from which it counts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((beside, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level <= len(file.parents):
            folder = file.parents[node.level - 1] if node.level else beside
            yield from ((folder, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names)


def place(error: BaseException) -> str:
    """`FILE:LINE: ` of the model's line that an error came from: the innermost one that is not a library's; or ''."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    return f"{_shown(frames[-1].filename)}:{frames[-1].lineno}: " if frames else ""


def brief(error: BaseException) -> str:
    """An exception's class and the first line of what it says: JAX explains itself at length."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text if len(text) <= 400 else text[:400] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _split(code: str) -> tuple[str, str]:
    if Path(code).expanduser().is_file():
        return code, ""
    source, colon, name = code.rpartition(":")
    if not colon or "/" in name or "\\" in name:  # the colon of a drive
        return code, ""
    return source, name


def _is_path(source: str) -> bool:
    return source.endswith(".py") or "/" in source or "\\" in source or Path(source).is_file()


def _run_file(path: Path) -> ModuleType:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"model_code: cannot read {path}: {error.strerror}") from error
    spec = importlib.util.spec_from_file_location(_PREFIX + path.stem, path.resolve())
    if spec is None:
        raise ConfigError(f"model_code: {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    _importable(path.resolve().parent)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        # Not by its loader, which would take a .pyc for up to date when the file was edited within the same second.
        exec(compile(source, str(path.resolve()), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before
        raise _failed(error, str(path)) from error
    return module


def _import(name: str, code: str) -> ModuleType:
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"model_code: {code!r} is no file, and there is no module {error.name!r} in the current directory, "
                "on PYTHONPATH or installed"
            ) from error
        raise _failed(error, name) from error


def _failed(error: BaseException, source: str) -> ConfigError:
    if isinstance(error, SyntaxError) and error.filename:
        return ConfigError(f"model_code: {_shown(error.filename)}:{error.lineno}: {type(error).__name__}: {error.msg}")
    return ConfigError(f"model_code: {place(error) or f'{source}: '}{brief(error)}")


def _importable(directory: Path) -> None:
    """Lets the code import what lies beside it; last, so that nothing installed is hidden by it."""
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _is_model(value: Any) -> bool:
    return not isinstance(value, ModuleType) and all(
        hasattr(value, n) for n in ("Config", "param_specs", "forward", "logits")
    )


def _check_arguments(function: Any, name: str, arguments: tuple[str, ...]) -> None:
    try:
        inspect.signature(function).bind(*arguments)
    except ValueError:  # some callables do not tell
        return
    except TypeError as error:
        code = getattr(function, "__code__", None)
        where = f"{_shown(code.co_filename)}:{code.co_firstlineno}: " if code else ""
        raise ConfigError(f"model_code: {where}{name} is called as {name}({', '.join(arguments)}): {error}") from error


_PACKAGE = Path(__file__).parent
_NOT_OURS = (str(Path(inspect.__file__).parent), "site-packages", "dist-packages", "<frozen")
_MODELS = _PACKAGE / "models"


def _is_library(filename: str) -> bool:
    """Whether a frame is Python's, a package's or the engine's; our own model files are model files."""
    path = Path(filename)
    if path.is_relative_to(_PACKAGE):
        return not path.is_relative_to(_MODELS) or path.stem == "from_nnx"
    return any(part in filename for part in _NOT_OURS) or path.parent.name == "ragged_paged_attention"


def _shown(filename: str) -> str:
    """A path as somebody in this directory would write it."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename
