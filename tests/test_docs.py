"""The documentation tells the truth: examples run, public names and errors have their entries, links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffedit
from diffedit import errors
from tests.saved_model import save_tiny_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^(?P<skip><!-- not run: .+ -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

# A random pipeline stands in for the models that the pages name: the examples test the interface, not the pictures.
STAND_INS = ("builtin:emoji", "path/to/base")


def modules() -> list[str]:
    found = [info.name for info in pkgutil.walk_packages(diffedit.__path__, "diffedit.")]
    return ["diffedit", *sorted(name for name in found if not name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_doctests(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0
    assert module.__doc__, f"{name} does not say what it is for"


def test_every_public_name_has_a_reference_entry() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    entries = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    homes = {name: f"{module}.{name}" for name, module in diffedit._PUBLIC.items()}
    missing = {name for name, entry in homes.items() if entry not in entries and diffedit._PUBLIC[name] not in entries}
    missing -= {"DiffEditError"} if "diffedit.errors" in entries else set()
    assert not missing, f"add them to docs/reference/: {sorted(missing)}"
    assert "diffedit.__version__" in text


def test_every_public_name_exists() -> None:
    assert all(getattr(diffedit, name) is not None for name in diffedit.__all__)


def test_every_reference_entry_exists() -> None:
    for page in sorted((DOCS / "reference").glob("*.md")):
        for entry in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            try:
                importlib.import_module(entry)
            except ModuleNotFoundError:
                home, _, name = entry.rpartition(".")
                assert hasattr(importlib.import_module(home), name), f"{page.name}: {entry}"


def error_classes() -> dict[str, str]:
    classes = [errors.DiffEditError]
    for cls in classes:
        classes += [sub for sub in cls.__subclasses__() if sub.__module__ == "diffedit.errors" and sub not in classes]
    return {cls.code: cls.__name__ for cls in classes}


def test_error_table_and_error_tree_agree() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (DE-\d{3}) \| `(\w+)` \|", text, re.MULTILINE))
    assert table == error_classes()
    assert len(table) == len(re.findall(r"^\| DE-", text, re.MULTILINE)), "a code is listed twice"


def test_command_line_page_names_every_option() -> None:
    from typer.main import get_command

    from diffedit.cli import app

    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, command in get_command(app).commands.items():
        assert f"`{name}" in text, name
        if name in ("ablate", "update"):
            options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
            hidden = {"--random-seed", "--out", "--help"}
            assert not {option for option in options - hidden if option not in text}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_no_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|Users|tmp|work)/", text)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("stand-in"), tmp_path_factory.mktemp("tokenizer"))


def with_code() -> list[Path]:
    return [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", with_code(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_run(page: Path, stand_in: Path, tmp_path: Path) -> None:
    """All Python blocks of a page, in order, as one program in an empty folder."""
    program = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        compile(match["code"], page.name, "exec")
        if not match["skip"]:
            program.append(match["code"])
    code = "\n".join(program)
    for name in STAND_INS:
        code = code.replace(f'"{name}"', repr(str(stand_in)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
