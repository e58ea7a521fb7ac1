"""Code of a user's own that params.yaml names as `module:PACKAGE.FILE:NAME`: found, imported and called.

Its files lie below the grid's folder, which is the working directory, or else below the repository's root. Nothing else is
imported by a name in params.yaml: of other files DVC would not see a change. textguard.dag tells DVC of these.
"""

import ast
import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from textguard.artifacts import code_of_users
from textguard.errors import InvalidParameter, TextguardError, printable

PREFIX = "module:"
FORM = re.compile(r"module:((?:[^\W\d]\w*\.)*[^\W\d]\w*):([^\W\d]\w*)")
REPOSITORY = Path(__file__).resolve().parent.parent
Made = TypeVar("Made")


def find(name: str, where: str) -> Any:
    """The object that `module:PACKAGE.FILE:NAME` names. where: the place of that name, for messages.

    Raises InvalidParameter where there is no such file or name, and, with file and line, where importing it fails.
    """
    file, module, wanted = _located(name, where)
    for folder in (REPOSITORY, Path.cwd()):
        sys.path[:] = [str(folder), *(other for other in sys.path if other != str(folder))]
    code_of_users.update(path.resolve() for path in _files(module))
    found = call(lambda: importlib.import_module(module), f"{name} in {where}: importing {module}")
    if Path(getattr(found, "__file__", None) or "").resolve() != file.resolve():
        raise InvalidParameter(
            f"{name} in {where}: {module} is another module of this name, {getattr(found, '__file__', 'built in')}; "
            f"rename {shown(file)}"
        )
    if not hasattr(found, wanted):
        known = sorted(other for other in vars(found) if not other.startswith("_"))
        close = difflib.get_close_matches(wanted, known, n=3) or known[:8]
        raise InvalidParameter(
            f"{name} in {where}: {shown(file)} holds no {wanted!r}; it holds {printable(', '.join(close)) or 'nothing'}"
        )
    return getattr(found, wanted)


def call(work: Callable[[], Made], what: str) -> Made:
    """What code of the user's returns. Raises InvalidParameter, with file and line of whatever it raised."""
    try:
        return work()
    except TextguardError:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidParameter(f"{what} failed: {told(error)}") from error


def told(error: BaseException) -> str:
    """An exception in one line: its class, what it says, and the last line of the user's code that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve() in code_of_users] or frames
    place = f" ({shown(Path(own[-1].filename))}, line {own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({shown(Path(error.filename))}, line {error.lineno})"
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {printable(said) or 'no reason given'}{place}"


def dependencies(name: str, where: str) -> list[str]:
    """The files behind `module:PACKAGE.FILE:NAME`, as dvc.yaml names them: its own, and those of the user's that it imports.

    What is imported is read off the import statements: nothing is run. Raises InvalidParameter for a file that is missing.
    """
    _, module, _ = _located(name, where)
    return sorted(_in_dvc_yaml(path) for path in _files(module))


def shown(file: Path) -> str:
    """A file as a message names it: from the working directory where it lies below."""
    path = file.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _located(name: str, where: str) -> tuple[Path, str, str]:
    """File, module and name of `module:PACKAGE.FILE:NAME`. Raises InvalidParameter."""
    parts = FORM.fullmatch(name)
    if not parts:
        raise InvalidParameter(
            f"{printable(repr(name), 100)} in {where} must be module:PACKAGE.FILE:NAME, as module:own.net:Net"
        )
    module, wanted = parts.groups()
    if not (file := _file(module)):
        folders = " or ".join(dict.fromkeys(str(folder) for folder in (Path.cwd(), REPOSITORY)))
        raise InvalidParameter(
            f"{name} in {where}: there is no file {module.replace('.', '/')}.py in {folders}; "
            "put it there, or a link to the folder that holds it"
        )
    return file, module, wanted


def _file(module: str) -> Path | None:
    """The user's file that holds a module; None for others, as for packages that are installed."""
    if module.partition(".")[0] in ("textguard", "stages"):
        return None
    for folder in (Path.cwd(), REPOSITORY):
        path = folder.joinpath(*module.split("."))
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file():
                return file
    return None


def _files(module: str) -> set[Path]:
    """The user's files that importing a module runs."""
    found: set[Path] = set()
    waiting, seen = [module], set()
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        waiting += [name.rpartition(".")[0]] * ("." in name)  # importing a.b runs a/__init__.py
        if file := _file(name):
            found.add(file)
            waiting += _imported(file, name if file.name == "__init__.py" else name.rpartition(".")[0])
    return found


def _imported(file: Path, package: str) -> Iterator[str]:
    """What may be modules among the names that a file imports. Of a file that is no Python: nothing, as importing it fails."""
    try:
        nodes: Iterable[ast.AST] = ast.walk(ast.parse(file.read_bytes()))
    except (SyntaxError, ValueError, OSError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*parents, node.module]))
            yield from filter(None, [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)])


def _in_dvc_yaml(file: Path) -> str:
    if file.is_relative_to(Path.cwd()):
        return str(file.relative_to(Path.cwd()))
    return f"${{root}}/{file.relative_to(REPOSITORY)}"
