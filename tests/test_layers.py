"""The import rules of the architecture, read from the source: who may know whom, and which libraries live where."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "diffedit"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300

# Room -> floor. A room may import rooms of lower floors, and of its own floor only where SIBLINGS does not forbid it.
FLOOR = {
    "_version": 0,
    "errors": 0,
    "garbage": 0,
    "linalg": 1,
    "storage": 1,
    "figures": 1,
    "text": 2,
    "bundled": 2,
    "request": 2,
    "site": 2,
    "delta": 2,
    "pairs": 2,
    "reading": 2,
    "rounding": 3,
    "intervention": 2,
    "aliases": 3,
    "spellings": 3,
    "interfaces": 3,
    "traceable": 3,
    "registry": 3,
    "backends": 4,
    "locators": 4,
    "updaters": 4,
    "io": 4,
    "provenance": 5,
    "targets": 5,
    "ledger": 5,
    "algebra": 5,
    "edit": 5,
    "summary": 5,
    "growth": 5,
    "metering": 5,
    "plan": 5,
    "planning": 5,
    "preparing": 5,
    "tracing": 5,
    "editor": 6,
    "drawing": 7,
    "tradeoff": 7,
    "fleet": 7,
    "audit": 7,
    "evaluate": 7,
    "cli": 8,
    "testing": 7,
    "__main__": 8,
    "__init__": 8,
}
SIBLINGS = [{"backends", "locators", "updaters", "io"}, {"evaluate", "testing"}, {"cli", "testing"}]

# Library -> where it may be imported (a room or one file).
ALLOWED_AT = {
    "diffusers": {"backends", "updaters/finetune", "evaluate/scorer.py"},
    "transformers": {"backends", "updaters/finetune", "evaluate/scorer.py"},
    "peft": {"io/lora.py"},
    "huggingface_hub": {"io/hub.py", "io/hub_client.py", "io/hub_push.py", "backends/loading.py"},
    "typer": {"cli"},
    "rich": {"cli"},
    "click": set(),
    "jinja2": {"evaluate"},
    "matplotlib": {"evaluate", "figures.py", "tracing/heatmap.py"},
}

# Rooms that may import their own package inside functions: the command line, so that --help needs no torch.
LAZY_ROOMS = {"cli"}


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def room(file: Path) -> str:
    return relative(file).split("/")[0].removesuffix(".py")


@dataclass(frozen=True)
class Imported:
    """One imported module: its dotted name, and whether it is imported in a function or for type checkers only."""

    name: str
    line: int
    in_function: bool
    typing_only: bool


@functools.cache
def source(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(source(file))


@functools.cache
def imports(file: Path) -> tuple[Imported, ...]:
    def walk(node: ast.AST, in_function: bool, typing_only: bool) -> Iterator[Imported]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom) and child.module == "diffedit":
                names = [f"diffedit.{alias.name}" for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                names = ["." * child.level + (child.module or "")]
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                guard = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                yield from walk(child, in_function or function, typing_only or guard)
                continue
            yield from (Imported(name, child.lineno, in_function, typing_only) for name in names)

    return tuple(walk(tree(file), False, False))


def own(file: Path) -> Iterator[tuple[str, Imported]]:
    """The imports of our own rooms: (room, import)."""
    for item in imports(file):
        parts = item.name.split(".")
        if parts[0] == "diffedit" and len(parts) > 1 and not parts[1].startswith("__"):
            yield parts[1], item


def test_the_package_is_found() -> None:
    assert {"editor.py", "errors.py", "cli/__init__.py"} <= {relative(file) for file in FILES}


def test_every_room_has_a_floor() -> None:
    homeless = {room(file) for file in FILES} - FLOOR.keys()
    assert not homeless, "give the new room a floor here and a line in the architecture"


def test_imports_go_down() -> None:
    wrong = []
    for file in FILES:
        here = room(file)
        for there, item in own(file):
            if there == here or item.typing_only:
                continue
            siblings = any({here, there} <= group for group in SIBLINGS)
            if siblings or FLOOR.get(there, 99) > FLOOR.get(here, 99):
                wrong.append(f"{relative(file)}:{item.line}: {here} must not import {there}")
    assert not wrong, "\n".join(wrong)


def test_imports_are_absolute() -> None:
    wrong = [f"{relative(file)}:{item.line}" for file in FILES for item in imports(file) if item.name.startswith(".")]
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for file in FILES:
        path = relative(file)
        for item in imports(file):
            allowed = ALLOWED_AT.get(item.name.split(".")[0])
            if allowed is None or item.typing_only:
                continue
            if not any(path == place or path.startswith(place + "/") for place in allowed):
                where = ", ".join(sorted(allowed)) or "no room"
                wrong.append(f"{path}:{item.line}: {item.name} belongs in {where}")
    assert not wrong, "\n".join(wrong)


def test_no_import_inside_a_function_hides_a_cycle() -> None:
    wrong = [
        f"{relative(file)}:{item.line}: {there}"
        for file in FILES
        if room(file) not in LAZY_ROOMS
        for there, item in own(file)
        if item.in_function
    ]
    assert not wrong, "\n".join(wrong)


def test_no_print_and_no_assert() -> None:
    wrong = []
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Assert):
                wrong.append(f"{relative(file)}:{node.lineno}: assert vanishes under python -O; raise an error")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append(f"{relative(file)}:{node.lineno}: print; return the text or log it")
    assert not wrong, "\n".join(wrong)


def test_files_stay_small() -> None:
    sizes = {relative(file): len(source(file).splitlines()) for file in FILES}
    wrong = {name: lines for name, lines in sizes.items() if lines > MAX_LINES}
    assert not wrong, f"one idea per file, {MAX_LINES} lines at most"


def test_nothing_that_runs_foreign_code() -> None:
    banned = ("import pickle", "torch.load(", "yaml.load(", " eval(", " exec(", "trust_remote_code=True")
    wrong = [f"{relative(file)}: {word}" for file in FILES for word in banned if word in source(file)]
    assert not wrong, "\n".join(wrong)
