"""`diffedit diff` and `diffedit verify`: exit codes, one JSON document, tables with what matters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffedit import Editor
from diffedit.cli import app
from tests.audit.conftest import OUT, low_rank
from tests.tiny import build


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def command(*args: object):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    return command


@pytest.fixture(scope="module")
def pair(folders, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A base, an edited copy, and the edit."""
    root = tmp_path_factory.mktemp("pair")
    editor = Editor(folders["sd1"])
    edit = editor.ablate("dog", target="cat", updater=build.plain(eos_weight=0)).save(root / "edit")
    return folders["sd1"], editor.save_pipeline(root / "edited"), edit


def test_diff_prints_what_changed_and_whom_it_moved(run, pair):
    out = run("diff", *pair[:2])
    assert out.exit_code == 0
    for word in ("closed-form edit", "F32", "of 32", "x median", "median of 7 words", "1 changed"):
        assert word in out.stdout, word
    assert [line.split("│")[1].strip() for line in out.stdout.splitlines() if "│ dog " in line]


def test_diff_as_one_document(run, pair):
    out = run("diff", *pair[:2], "--word", "zebra", "--json")
    document = json.loads(out.stdout)
    assert document["command"] == "diff" and document["differs"] is True
    assert document["tensors"][0]["name"] == f"text_encoder.{OUT}"
    assert "zebra" in {move["word"] for move in document["overall"]["words"]}


def test_exit_codes_of_diff(run, pair, tmp_path):
    base, edited, edit = pair
    assert run("diff", base, edited, "--no-words", "--exit-code").exit_code == 1
    assert run("diff", base, base, "--exit-code").exit_code == 0
    assert run("diff", base, edited, "--no-words", "--exit-code", "--json").exit_code == 1
    assert run("diff", base, tmp_path / "nothing").exit_code == 2
    assert run("diff", base, edit).exit_code == 2
    assert run("diff", base).exit_code == 2
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02.")
    refused = run("diff", base, tmp_path / "model.ckpt", "--json")
    assert refused.exit_code == 2 and json.loads(refused.stdout)["error"]["code"] == "DE-203"
    broken = Path(shutil.copytree(edited, tmp_path / "broken")) / "unet" / "diffusion_pytorch_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    assert run("diff", base, tmp_path / "broken").exit_code == 1


def test_words_from_a_file(run, pair, tmp_path):
    (tmp_path / "words.txt").write_text("# mine\nsun\n\n moon \n", encoding="utf-8")
    out = run("diff", *pair[:2], "--words", "words.txt", "--json")
    assert {move["word"] for move in json.loads(out.stdout)["overall"]["words"]} == {"sun", "moon"}
    (tmp_path / "none.txt").write_text("# nothing\n", encoding="utf-8")
    for odd in ("none.txt", "absent.txt", tmp_path):
        assert run("diff", *pair[:2], "--words", odd).exit_code == 2
    assert run("diff", *pair[:2], "--no-words", "--word", "sun").exit_code == 2


def test_many_changed_tensors_are_cut_and_counted(run, folders, edited):
    def change(tensors):
        for seed, name in enumerate(sorted(tensors)):
            if tensors[name].ndim == 2:
                tensors[name] += low_rank(tensors[name], 2, 0.1, seed).float()

    found = run("diff", folders["sd1"], edited(folders["sd1"], "unet", change), "--no-words")
    assert "more; --json lists all" in found.stdout and found.stdout.count("F32") == 24


def test_verify_prints_every_check(run, pair):
    base, _, edit = pair
    out = run("verify", edit, "--base", base)
    assert out.exit_code == 0 and "10 checks passed" in out.stdout and "applying gives the recorded" in out.stdout
    without = run("verify", edit)
    assert without.exit_code == 0 and "2 skipped or changed" in without.stdout


def test_exit_codes_of_verify(run, pair, tmp_path):
    _, edited, edit = pair
    assert run("verify", tmp_path / "nothing").exit_code == 2
    assert run("verify", edit, "--base", "nothing").exit_code == 2
    assert run("verify", edit, "--base", edited).exit_code == 1
    copy = Path(shutil.copytree(edit, tmp_path / "copy"))
    (copy / "README.md").write_text("mine", encoding="utf-8")
    assert run("verify", copy).exit_code == 0
    (copy / "model.bin").write_bytes(b"x")
    out = run("verify", copy, "--json")
    document = json.loads(out.stdout)
    assert out.exit_code == 1 and document["ok"] is False and document["command"] == "verify"
    assert [check["name"] for check in document["checks"] if check["outcome"] == "fail"] == ["files"]
    assert "checks failed" in run("verify", copy).stdout
