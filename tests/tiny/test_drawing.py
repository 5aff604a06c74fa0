"""Pictures by several processes are those of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffedit import Editor
from diffedit.cli import app
from diffedit.drawing import draw
from tests.launch import launched
from tests.saved_model import save_tiny_model

PROMPTS = ("a dog", "a cat", "the pig")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("tokenizer"))


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pictures_are_kept_batch_by_batch_in_order(model):
    editor = Editor(model)
    pairs = [(prompt, seed) for prompt in PROMPTS for seed in (0, 1, 2)]
    kept, calls = {}, []
    plain = editor.generate_pairs

    def count(chosen, **options):
        calls.append((len(chosen), len(kept)))
        return plain(chosen, **options)

    editor.generate_pairs = count
    assert draw(editor, pairs, kept.__setitem__, batch_size=4) == 9
    assert calls == [(4, 0), (4, 4), (1, 8)] and list(kept) == list(range(9))
    editor.generate_pairs = plain
    alone = editor.generate_pairs(pairs[4:8], batch_size=4)
    assert [kept[i].tobytes() for i in range(4, 8)] == [image.tobytes() for image in alone]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_draws_the_same(model, tmp_path, processes):
    edit = Editor(model).ablate("dog", target="cat").save(tmp_path / "no-dog")
    seeds = [word for seed in range(5) for word in ("--seed", str(seed))]
    arguments = ["generate", str(model), *PROMPTS, *seeds, "--edit", str(edit), "--batch-size", "2", "--json"]
    one = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    many = [*arguments, "-o", str(tmp_path / "many")]
    done = launched(many, tmp_path, processes)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)  # exactly one, from the first process
    assert len(document["pictures"]) == 15
    assert pictures(tmp_path / "one") == pictures(tmp_path / "many") and len(pictures(tmp_path / "many")) == 15
    again = launched(many, tmp_path, processes)
    assert again.returncode != 0 and "a picture of that name is already there" in again.stdout
