"""What people get wrong: one clear error, the right exit code, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from diffedit.cli import shell
from diffedit.errors import DiffEditError, EmptySubjectError, IntegrityError

USAGE = [
    ((), None),
    (("nonsense",), "nonsense"),
    (("ablate",), "MODEL"),
    (("ablate", "builtin:emoji"), "SUBJECT"),
    (("update", "builtin:emoji", "dog"), "TARGET"),
    (("show", "folder", "--nonsense"), "nonsense"),
    (("ablate", "m", "dog", "--kind", "thing"), "thing"),
    (("ablate", "m", "dog", "--dtype", "float8"), "float8"),
    (("generate", "m", "a dog", "--steps", "0"), "--steps"),
    (("apply", "m", "-o", "x"), "edit"),
]
BAD_INPUT = [
    (("ablate", "{model}", " "), "DE-101", 2),
    (("ablate", "{model}", "dog", "--target", "dog"), "DE-104", 2),
    (("ablate", "{model}", "dog", "--preserve", "dog"), "DE-104", 2),
    (("ablate", "{model}", "dog", "--template", "no slot"), "DE-100", 2),
    (("ablate", "{model}", "dog " * 80), "DE-103", 2),
    (("ablate", "{model}", "dog", "--updater", "quickfx"), "DE-200", 2),
    (("ablate", "{model}", "dog", "--locator", "fixd"), "DE-200", 2),
    (("ablate", "{model}", "dog", "--backend", "sd9"), "DE-200", 2),
    (("ablate", "{model}", "dog", "--device", "abacus"), "DE-100", 2),
    (("ablate", "{model}", "dog", "--set", "lam"), "DE-100", 2),
    (("ablate", "{model}", "dog", "--set", "lambda=1"), "DE-100", 2),
    (("ablate", "{model}", "dog", "--set", "lam=-1"), "DE-100", 2),
    (("ablate", "{model}", "dog", "--set", "lam=much"), "DE-100", 2),
    (("ablate", "{model}", "dog", "--set", "lam=1", "--set", "lam=2"), "DE-100", 2),
    (("ablate", "{model}", "dog", "--set", "locator.depth=1"), "DE-100", 2),
    (("ablate", "{model}", "dog", "--set", "locator.layer=99"), "DE-202", 2),
    (("ablate", "{model}", "dog", "-o", "{taken}"), "DE-504", 2),
    (("ablate", "no-such-model", "dog"), "DE-201", 2),
    (("ablate", "builtin:emojy", "dog"), "DE-200", 2),
    (("ablate", "{pickle}", "dog"), "DE-203", 2),
    (("show", "no-such-folder"), "DE-505", 1),
    (("show", "{taken}"), None, 1),
    (("generate", "{model}", "a dog", "--edit", "no-such-folder"), "DE-505", 1),
    (("apply", "{model}", "--edit", "no-such-folder", "-o", "out"), "DE-505", 1),
    (("apply", "{model}", "--edit", "x", "-o", "{taken}"), "DE-504", 2),
]


@pytest.fixture
def places(model, tmp_path_factory):
    """The names that the cases above fill in."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (folder / "model.ckpt").write_bytes(b"\x80\x04.")
    return {"model": str(model), "taken": str(folder / "taken"), "pickle": str(folder / "model.ckpt")}


def test_without_arguments_it_helps(cli):
    outcome = cli()
    assert outcome.code == 0 and "Usage" in outcome.out and "ablate" in outcome.out


@pytest.mark.parametrize(
    ("args", "word"), USAGE[1:], ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_usage_errors(cli, args, word):
    text = cli(*args)
    assert text.code == 2 and text.out == "" and word in text.err and "--help" in text.err
    assert "Traceback" not in text.err
    machine = cli(*args, "--json")
    assert machine.code == 2 and machine.error["code"] == "USAGE" and word in machine.error["message"]


@pytest.mark.parametrize(
    ("args", "code", "exit_code"), BAD_INPUT, ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else ""
)
def test_bad_input(cli, places, args, code, exit_code):
    before = sorted(Path().rglob("*"))
    outcome = cli(*(arg.format(**places) if "{" in arg else arg for arg in args), "--json")
    assert outcome.code == exit_code, outcome.out + outcome.err
    error = outcome.error
    assert code in (None, error["code"]), error
    assert error["message"].startswith(f"[{error['code']}]") and error["case"]
    assert error["hint"] or error["cause"], "an error says what to do next"
    assert sorted(Path().rglob("*")) == before, "a refused command leaves nothing behind"
    assert Path(places["taken"], "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_the_nearest_name_is_offered(cli, model):
    assert "'quickfix'" in cli("ablate", model, "dog", "--updater", "quickfx", "--json").error["hint"]
    assert "'lam'" in cli("ablate", model, "dog", "--set", "lamb=1", "--json").error["hint"]
    assert "'ablate'" in cli("ablat", "--json").error["message"]


def test_text_errors_go_to_stderr_with_code_value_and_next_step(cli, model):
    outcome = cli("ablate", model, "dog", "--template", "[bold]no slot")
    assert outcome.out == "" and outcome.code == 2
    assert "DE-100" in outcome.err and "[bold]no slot" in outcome.err and "Write for example" in outcome.err


def test_debug_shows_the_traceback(cli):
    assert "Traceback" not in cli("show", "nowhere").err
    assert "Traceback" in cli("show", "nowhere", "--debug").err


def test_an_existing_edit_is_replaced_only_on_request(cli, model):
    assert cli("ablate", model, "dog", "--target", "cat", "-o", "out").code == 0
    first = Path("out/edit.safetensors").read_bytes()
    assert cli("ablate", model, "dog", "--target", "pig", "-o", "out").code == 2
    assert Path("out/edit.safetensors").read_bytes() == first
    assert cli("ablate", model, "dog", "--target", "pig", "-o", "out", "--overwrite").code == 0
    assert Path("out/edit.safetensors").read_bytes() != first


def test_a_picture_is_replaced_only_on_request(cli, model):
    command = ("generate", model, "a dog", "--steps", 1, "-o", "pictures", "--json")
    assert cli(*command).code == 0
    assert cli(*command).error["code"] == "DE-504"
    assert cli(*command, "--overwrite").code == 0


def test_a_damaged_edit_is_refused(cli, model):
    cli("ablate", model, "dog", "--target", "cat", "-o", "out")
    data = bytearray(Path("out/edit.safetensors").read_bytes())
    data[-1] ^= 1
    Path("out/edit.safetensors").write_bytes(data)
    outcome = cli("show", "out", "--json")
    assert outcome.code == 1 and outcome.error["code"] == IntegrityError.code


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (EmptySubjectError("empty", value="''"), "DE-101", 2),
        (DiffEditError("anything"), "DE-000", 2),
        (KeyboardInterrupt(), "INTERRUPTED", 130),
        (typer.Abort(), "INTERRUPTED", 130),
        (typer.BadParameter("no"), "USAGE", 2),
        (ZeroDivisionError("x"), "INTERNAL", 1),
    ],
)
def test_describe_error(error, code, exit_code):
    document, number = shell.describe_error(error)
    assert (document["error"]["code"], number) == (code, exit_code)
    json.dumps(document)


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), ZeroDivisionError("boom")], ids=["interrupt", "bug"])
def test_surprises_inside_a_command(cli, monkeypatch, raised):
    def fail(path):
        raise raised

    monkeypatch.setattr("diffedit.edit.Edit.load", fail)
    outcome = cli("show", "x", "--json")
    expected = ("INTERRUPTED", 130) if isinstance(raised, KeyboardInterrupt) else ("INTERNAL", 1)
    assert (outcome.error["code"], outcome.code) == expected
    assert "Traceback" not in outcome.err


def test_json_has_no_nan():
    text = shell.to_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": "é"}})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": "é"}}


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_importing_the_package_or_asking_for_help_imports_no_torch():
    code = (
        "import sys, diffedit, diffedit.cli\n"
        "assert 'Editor' in dir(diffedit)\n"
        "diffedit.cli.app(['ablate', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "--preserve" in done.stdout


def test_python_m_and_version():
    done = run(sys.executable, "-m", "diffedit", "--version")
    assert done.returncode == 0 and done.stdout.startswith("diffedit ")


def test_a_closed_pipe_is_no_crash():
    done = run("bash", "-c", f"{sys.executable} -m diffedit ablate --help | true")
    assert "Traceback" not in done.stderr
