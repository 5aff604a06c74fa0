"""Nothing in the package unpickles, evaluates text, or lets a model bring code of its own: read from the syntax trees.

A search for words would miss `from pickle import loads` and trip over comments; so imports, names, attributes, keyword
arguments and strings are each looked at. The control is a text that does all of it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "diffedit"
FILES = sorted(PACKAGE.rglob("*.py"))

# Modules that run code found in data, or make code from text.
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "runpy",
           "code", "codeop", "imp", "fickling"}  # fmt: skip
# Functions by their bare name, and by the last two parts of a dotted one.
BARE = {"eval", "exec", "compile", "__import__", "execfile"}
DOTTED = {"torch.load", "torch.save", "torch.jit", "torch.hub", "numpy.load", "np.load", "yaml.load", "os.system",
          "yaml.unsafe_load", "yaml.full_load", "os.popen", "pandas.read_pickle", "builtins.eval", "builtins.exec",
          "util.spec_from_file_location", "machinery.SourceFileLoader"}  # fmt: skip
# Arguments that let a download bring code, whatever their value; and one that must be true wherever it stands.
ARGUMENTS = {"trust_remote_code", "custom_pipeline", "custom_revision", "allow_pickle", "weights_only", "shell"}
FIXED = {"use_safetensors": True}
# Loaders of diffusers and transformers fall back to pickles unless told not to. Tokenizers and such have no weights.
LOADERS = {"from_pretrained", "from_single_file"}
WEIGHTLESS = re.compile(r"(?i)(^edit|tokenizer|processor|scheduler)\)?$")


def dotted(node: ast.AST) -> str:
    """ "a.b.c" of an attribute chain; "" where it starts with something else than a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def findings(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) for everything that could run foreign code."""
    docstrings = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(id(first.value))
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            yield from ((line, f"import {a.name}") for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if home.split(".")[0] in MODULES:
                yield line, f"from {home}"
            yield from ((line, f"{home}.{a.name}") for a in node.names if f"{home}.{a.name}" in DOTTED)
        elif isinstance(node, ast.Name) and node.id in BARE:
            yield line, node.id
        elif isinstance(node, ast.Attribute) and ".".join(dotted(node).split(".")[-2:]) in DOTTED:
            yield line, dotted(node)
        elif isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
            yield line, f"{node.arg}="
        elif isinstance(node, ast.keyword) and node.arg in FIXED and ast.unparse(node.value) != str(FIXED[node.arg]):
            yield line, f"{node.arg}={ast.unparse(node.value)}"
        elif isinstance(node, ast.arg) and node.arg in ARGUMENTS:
            yield line, f"argument {node.arg}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words = ARGUMENTS - {"shell", "custom_pipeline"}
            yield from ((line, f"text {word!r}") for word in words | MODULES - {"code"} if node.value == word)


def unsafe_loads(source: str) -> Iterator[tuple[int, str]]:
    """(line, loader) of model loaders in a file where nothing asks for safetensors.

    A call has to ask itself; a loader that is handed on as a function has to be near one that does.
    """
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    asked = any(isinstance(node, ast.keyword) and node.arg in FIXED for node in ast.walk(tree))
    asked |= any(isinstance(node, ast.Constant) and node.value in FIXED for node in ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in LOADERS and not WEIGHTLESS.search(ast.unparse(node.value)):
            call = calls.get(id(node))
            if not (asked if call is None else any(keyword.arg in FIXED for keyword in call.keywords)):
                yield node.lineno, ast.unparse(node)


CONTROL = """
import pickle, numpy as np, torch, yaml
from dill import loads
from torch import load
getattr(torch, "x")(pickle.loads(b""))
eval("1"); exec("1"); compile("1", "", "eval"); __import__("os")
torch.load("x"); np.load("x", allow_pickle=True); yaml.load("x")
pipe.from_pretrained("x", trust_remote_code=False, custom_pipeline="y", use_safetensors=None)
def f(trust_remote_code): ...
getattr(model, "trust_remote_code")
"""


def test_the_control_is_found() -> None:
    found = {what for _, what in findings(CONTROL)}
    assert found >= {
        *("import pickle", "from dill", "torch.load", "eval", "exec", "compile", "__import__", "np.load", "yaml.load"),
        *("allow_pickle=", "trust_remote_code=", "custom_pipeline=", "use_safetensors=None"),
        *("argument trust_remote_code", "text 'trust_remote_code'"),
    }
    assert len(list(unsafe_loads('pipe.from_pretrained("x")\nload(AutoencoderKL.from_single_file, "x")'))) == 2
    assert not list(unsafe_loads('pipe.from_pretrained("x", use_safetensors=True)'))
    assert not list(unsafe_loads('CLIPTokenizer.from_pretrained("x")'))


def test_the_package_is_found() -> None:
    assert len(FILES) > 30 and PACKAGE / "backends" / "loading.py" in FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_code_from_data(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert not list(findings(source))
    assert not list(unsafe_loads(source))
