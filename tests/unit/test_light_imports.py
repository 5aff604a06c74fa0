"""`import diffedit` and every `--help` answer at once, because none of them imports torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from typer.main import get_command

from diffedit.cli import app

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "PIL", "safetensors", "huggingface_hub")

IMPORT = """
import json, sys
import diffedit
dir(diffedit), diffedit.__version__
print(json.dumps(sorted(sys.modules)))
"""

HELP = """
import contextlib, io, json, sys
from diffedit.cli import app
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            app([*words, "--help"])
        except SystemExit as stop:
            assert stop.code == 0, words
    assert "Usage" in text.getvalue(), words
print(json.dumps(sorted(sys.modules)))
"""


def loaded(script: str, *arguments: str) -> set[str]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_the_package_imports_nothing_heavy():
    names = loaded(IMPORT)
    assert "diffedit" in names and not names & {*HEAVY, "pydantic", "typer", "rich"}


def test_no_help_imports_anything_heavy():
    commands = [[], *([name] for name in get_command(app).commands)]
    assert len(commands) > 10
    assert not loaded(HELP, json.dumps(commands)) & {*HEAVY}
