"""Many models, one after the other: what a run leaves, what it takes up again, and what it survives."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from diffedit import Editor
from diffedit.errors import RequestError
from diffedit.fleet import apply_to_models
from tests.formats.made import embed, gap, random_edit, sites_of, tree

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def fleet(bases, checkpoints, tmp_path_factory):
    """An edit, and four models that it fits: a folder, its half-precision copy, and two single files."""
    root = tmp_path_factory.mktemp("fleet")
    shutil.copytree(bases["sd1"], root / "full")
    StableDiffusionPipeline.from_pretrained(bases["sd1"]).to(torch.float16).save_pretrained(root / "half")
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copyfile(checkpoints["sd1"], root / name)
    editor = Editor(bases["sd1"])
    edit = random_edit(editor, sites_of(editor, "text"))
    edit.revert()
    edit.save(root / "edit")
    return edit, [root / name for name in ("full", "half", "a.safetensors", "b.safetensors")], bases["sd1"]


@pytest.fixture
def run(fleet, tmp_path):
    """`run(models=...)` with the fleet's edit into `tmp_path / "out"`."""
    edit, models, base = fleet

    def go(chosen=models, **options):
        return apply_to_models([edit], chosen, tmp_path / "out", config=str(base), **options)

    return go


def statuses(outcomes) -> list[str]:
    return [outcome.status for outcome in outcomes]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_model_gets_the_copy_that_it_would_get_alone(fleet, run, tmp_path, monkeypatch):
    edit, models, base = fleet
    for model in models:
        editor = Editor(model, config=str(base))
        editor.load(edit.copy())
        assert editor.pipeline.unet is not None  # the plain way: everything in memory
        editor.save_pipeline(tmp_path / "alone" / model.name)

    def refuse(*args, **kwargs):
        raise AssertionError("a UNet was built")

    monkeypatch.setattr(UNet2DConditionModel, "__init__", refuse)
    outcomes = run()
    assert statuses(outcomes) == ["written"] * 4 and not any(outcome.error for outcome in outcomes)
    assert [Path(outcome.out) for outcome in outcomes] == [tmp_path / "out" / model.name for model in models]
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")
    assert not edit.applied


def test_what_is_done_is_kept_by_content(run, tmp_path):
    run()
    before = times(tmp_path / "out")
    assert statuses(run()) == ["kept"] * 4
    assert times(tmp_path / "out") == before


def test_an_interrupted_run_goes_on(run, tmp_path):
    def stop(number, outcome):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["full", "half"]
    assert statuses(run()) == ["kept", "kept", "written", "written"]


KILLED = """
import os, shutil, signal, sys
from diffedit import Edit
from diffedit.backends import tensorfile
from diffedit.fleet import apply_to_models

edit, base, out, *models = sys.argv[1:]

def cut(source, target, tensors, names=None):
    with open(target, "wb") as file:
        file.write(source.path.read_bytes()[:50_000])
    os.kill(os.getpid(), signal.SIGKILL)

def arm(number, outcome):
    from diffedit.backends import checkpoint
    checkpoint.copy_patched = cut

apply_to_models([Edit.load(edit)], models, out, config=base, progress=arm)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_half_of_a_model_and_goes_on(fleet, run, tmp_path):
    _, models, base = fleet
    two = [models[0], models[2]]
    arguments = [str(path) for path in (models[0].parent / "edit", base, tmp_path / "out", *two)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "full" in left and len(left) == 2 and left[0].startswith(".diffedit-")
    assert statuses(run(two)) == ["kept", "written"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.safetensors", "full"]


def empty(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


@pytest.mark.parametrize(
    ("number", "damage"),
    [
        (0, lambda out: cut(out / UNET, 0.5)),
        (0, lambda out: cut(out / TEXT, 0.7)),
        (0, lambda out: (out / "model_index.json").unlink()),
        pytest.param(0, lambda out: shutil.rmtree(out / "vae"), marks=pytest.mark.slow),
        pytest.param(
            0, lambda out: [path.unlink() for path in out.rglob("*") if path.is_file()], marks=pytest.mark.slow
        ),
        (2, lambda out: cut(out, 0.4)),
        pytest.param(2, lambda out: cut(out, 0), marks=pytest.mark.slow),
    ],
    ids=["unet cut", "text encoder cut", "no index", "no vae", "empty folders", "file cut", "empty file"],
)
def test_a_half_written_copy_is_written_again(fleet, run, tmp_path, number, damage):
    model = fleet[1][number]
    run([model])
    whole = tree(tmp_path)
    damage(tmp_path / "out" / model.name)
    assert tree(tmp_path) != whole
    assert statuses(run([model])) == ["written"]
    assert tree(tmp_path) == whole


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, lambda out: flip(out / UNET)),
        (0, lambda out: flip(out / TEXT)),
        pytest.param(0, lambda out: (out / "notes.txt").write_text("mine", encoding="utf-8"), marks=pytest.mark.slow),
        (2, flip),
        pytest.param(2, lambda out: out.write_bytes(out.read_bytes() + b"x"), marks=pytest.mark.slow),
    ],
    ids=["unet", "text encoder", "a file more", "single file", "longer file"],
)
def test_something_else_in_the_place_is_left_alone_unless_overwriting(fleet, run, tmp_path, number, change):
    models = [fleet[1][number], fleet[1][3]]
    run(models)
    whole = tree(tmp_path)
    change(tmp_path / "out" / models[0].name)
    changed = tree(tmp_path)
    first, second = run(models)
    assert (first.status, first.code, second.status) == ("failed", "DE-504", "kept")
    assert "something else is already there" in first.error and "--overwrite" in first.error
    assert tree(tmp_path) == changed
    assert statuses(run(models, overwrite=True)) == ["written", "kept"]
    assert tree(tmp_path) == whole


def test_the_unedited_model_in_the_place_is_something_else(fleet, run, tmp_path):
    shutil.copytree(fleet[1][0], tmp_path / "out" / "full")
    shutil.copyfile(fleet[1][2], tmp_path / "out" / "a.safetensors")
    assert [outcome.code for outcome in run([fleet[1][0], fleet[1][2]])] == ["DE-504", "DE-504"]


def test_models_that_fail_do_not_stop_the_others(fleet, bases, run, tmp_path):
    full, half, a, _ = fleet[1]
    damaged = Path(shutil.copytree(full, tmp_path / "damaged"))
    cut(damaged / TEXT, 0.5)
    (tmp_path / "pickle.ckpt").write_bytes(b"x")
    other = Path(shutil.copytree(bases["sd2"], tmp_path / "other"))
    outcomes = run([full, damaged, tmp_path / "pickle.ckpt", other, tmp_path / "gone", half, a])
    assert statuses(outcomes) == ["written", "failed", "failed", "failed", "failed", "written", "written"]
    codes = [outcome.code for outcome in outcomes if outcome.status == "failed"]
    assert codes == ["DE-201", "DE-203", "DE-600", "DE-201"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.safetensors", "full", "half"]


def test_an_error_that_nobody_foresaw_is_one_models_error(fleet, run, monkeypatch):
    plain = Editor.save_pipeline

    def save(self, path, **options):
        if path.name == "half":
            raise RuntimeError("no idea")
        return plain(self, path, **options)

    monkeypatch.setattr(Editor, "save_pipeline", save)
    outcomes = run()
    assert statuses(outcomes) == ["written", "failed", "written", "written"]
    assert (outcomes[1].code, outcomes[1].error) == ("INTERNAL", "RuntimeError: no idea")


def test_a_unet_that_cannot_be_read_is_copied_as_it_is(fleet, run, tmp_path):
    broken = Path(shutil.copytree(fleet[1][0], tmp_path / "broken"))
    (broken / UNET).write_bytes(b"\xff" * (broken / UNET).stat().st_size)
    assert statuses(run([broken])) == ["written"]
    assert (tmp_path / "out" / "broken" / UNET).read_bytes() == (broken / UNET).read_bytes()
    assert statuses(run([broken])) == ["kept"]
    stock = CLIPTextModel.from_pretrained(tmp_path / "out" / "broken" / "text_encoder")
    plain = CLIPTextModel.from_pretrained(fleet[1][0] / "text_encoder")
    assert any(not torch.equal(a, b) for a, b in zip(stock.parameters(), plain.parameters(), strict=True))


def test_edits_of_the_unet_go_the_same_way(fleet, bases, tmp_path):
    editor = Editor(bases["sd1"])
    edit = random_edit(editor, sites_of(editor, "mixed"))
    wanted = embed(editor.pipeline)
    models = [fleet[1][0], fleet[1][2]]
    for expected in ("written", "kept"):
        outcomes = apply_to_models([edit], models, tmp_path, config=str(bases["sd1"]))
        assert statuses(outcomes) == [expected] * 2, outcomes
    assert gap(embed(StableDiffusionPipeline.from_pretrained(tmp_path / "full")), wanted) == 0
    flip(tmp_path / "full" / UNET)
    assert apply_to_models([edit], models[:1], tmp_path, config=str(bases["sd1"]))[0].code == "DE-504"


def test_one_model_at_a_time_is_in_memory(run):
    gc.collect()

    def count() -> int:
        return sum(isinstance(item, CLIPTextModel) for item in gc.get_objects())

    before, seen = count(), []
    run(progress=lambda number, outcome: seen.append(count() - before))
    assert seen == [0, 0, 0, 0]


def test_what_makes_no_sense_is_refused_before_anything_runs(fleet, run, tmp_path):
    edit, models, _ = fleet
    twin = Path(shutil.copytree(models[0], tmp_path / "elsewhere" / "full"))
    with pytest.raises(RequestError, match="written to one place"):
        run([models[0], twin])
    with pytest.raises(RequestError, match="there are no models"):
        run([])
    with pytest.raises(RequestError, match="there are no edits"):
        apply_to_models([], models, tmp_path / "out")
    with pytest.raises(RequestError, match="would be the model itself"):
        apply_to_models([edit], [twin], twin.parent)
    assert not (tmp_path / "out").exists()
