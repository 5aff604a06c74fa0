"""Proves that a trace is the same after saving, after an interruption, and from the command line; and LocoGen."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from diffedit import Editor, registry
from diffedit.cli import app
from diffedit.errors import (
    MalformedArtifactError,
    NoCausalSiteError,
    OutputExistsError,
    RequestError,
    StorageError,
    SubjectNotFoundError,
    UnknownNameError,
    UnsupportedModelError,
    UnsupportedVersionError,
)
from diffedit.intervention import find_parts
from diffedit.locators.locogen import LocoGen
from diffedit.locators.tracer import Tracer
from diffedit.request import make_request
from diffedit.site import Role
from diffedit.testing import check_locator, model_state
from diffedit.tracing.probes import NAMES, load_probes
from diffedit.tracing.result import CausalTrace
from diffedit.tracing.run import estimate_seconds
from tests.launch import launched
from tests.saved_model import save_tiny_model

PROMPTS = ["a photo of a dog", "the dog in the sun", "a dog"]
CHEAP = dict(measure="embedding", seeds=2)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def editor(sd1):
    return Editor(sd1)


def same(first, second):
    return first.describe() == second.describe() and all(
        np.array_equal(getattr(first, name), getattr(second, name), equal_nan=True)
        for name in ("clean", "corrupted", "restored")
    )


def test_the_editor_traces_and_leaves_the_model_alone(editor):
    before = model_state(editor.pipeline)
    found = editor.trace(PROMPTS, "dog", **CHEAP, tokens=("last_subject", "each"))
    assert isinstance(found, CausalTrace) and len(found.units) == 6
    assert model_state(editor.pipeline) == before
    assert found.best().sites[0] in editor.backend.sites()
    one = editor.trace("a dog", "dog", **CHEAP)
    assert {unit.prompt for unit in one.units} == {"a dog"}


def test_ablating_with_the_trace_edits_where_it_points(planted):
    edit = Editor(planted.model.pipeline).ablate("dog", target="cat", preserve=[], locator="causal-trace")
    assert edit.manifest.locator.name == "causal-trace"
    assert [(site.layer, site.role) for site in edit.delta.sites] == [(1, Role.TEXT_SELF_ATTN_OUT)]


def test_a_saved_trace_comes_back_the_same(editor, tmp_path):
    found = editor.trace(PROMPTS, "dog", **CHEAP, tokens=("last_subject", "each"), seed=3)
    back = CausalTrace.load(found.save(tmp_path / "t"))
    assert same(found, back) and back.states == found.states and back.best() == found.best()
    assert found.files() == back.files()
    with pytest.raises(OutputExistsError):
        found.save(tmp_path / "t")
    found.save(tmp_path / "t", overwrite=True)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda folder: (folder / "trace.json").write_text("{"), MalformedArtifactError),
        (lambda folder: (folder / "trace.json").write_text("{}"), MalformedArtifactError),
        (lambda folder: (folder / "trace.safetensors").write_bytes(b"no"), MalformedArtifactError),
        (lambda folder: (folder / "trace.json").unlink(), StorageError),
        (lambda folder: edit_json(folder, format=99), UnsupportedVersionError),
        (lambda folder: edit_json(folder, columns=["eos"]), MalformedArtifactError),
    ],
    ids=["cut", "empty", "tensors", "missing", "later", "other shape"],
)
def test_a_damaged_trace_is_refused(editor, tmp_path, change, error):
    editor.trace(PROMPTS, "dog", **CHEAP).save(tmp_path)
    change(tmp_path)
    with pytest.raises(error):
        CausalTrace.load(tmp_path)


def edit_json(folder, **fields):
    path = folder / "trace.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_interrupted_trace_goes_on_and_ends_the_same(editor, tmp_path, monkeypatch):
    whole = editor.trace(PROMPTS, "dog", **CHEAP)
    out, real, ran = tmp_path / "t", Tracer.run, []

    def until(limit):
        def run(self, unit):
            if len(ran) == limit:
                raise KeyboardInterrupt
            ran.append(unit)
            return real(self, unit)

        return run

    monkeypatch.setattr(Tracer, "run", until(2))
    with pytest.raises(KeyboardInterrupt):
        editor.trace(PROMPTS, "dog", **CHEAP, out=out)
    assert len(list((out / "units").iterdir())) == 2 and not (out / "trace.json").exists()
    (out / "units" / "foreign.json").write_text("{}")
    broken = next(path for path in (out / "units").iterdir() if path.name != "foreign.json")
    broken.write_text('{"clean": 1.0')
    monkeypatch.setattr(Tracer, "run", until(99))
    found = editor.trace(PROMPTS, "dog", **CHEAP, out=out)
    assert len(ran) == 2 + 5  # one of the two had to be run again
    assert same(found, whole) and same(CausalTrace.load(out), whole)
    assert [path.name for path in (out / "units").iterdir()] == ["foreign.json"]
    with pytest.raises(OutputExistsError):
        editor.trace(PROMPTS, "dog", **CHEAP, out=out)


def test_units_of_another_model_or_setting_are_not_taken_up(editor, tmp_path, monkeypatch):
    out, real = tmp_path / "t", Tracer.run

    def stop(self, unit):
        if list(out.glob("units/*")):
            raise KeyboardInterrupt
        return real(self, unit)

    monkeypatch.setattr(Tracer, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        editor.trace(PROMPTS, "dog", **CHEAP, out=out)
    monkeypatch.setattr(Tracer, "run", real)
    next(editor.pipeline.text_encoder.parameters()).data[5] += 0.5
    fresh = editor.trace(PROMPTS, "dog", **CHEAP)
    assert same(editor.trace(PROMPTS, "dog", **CHEAP, out=out), fresh)


@pytest.mark.parametrize("component", ["text_encoder", "unet"])
@pytest.mark.parametrize("name", ["map.png", "map.svg"])
def test_the_heat_map_is_drawn(editor, tmp_path, component, name):
    settings = CHEAP if component == "text_encoder" else dict(measure="denoising", seeds=1)
    found = editor.trace(PROMPTS[:2], "dog", component=component, **settings)
    for effect in ("signed", "raw"):
        assert found.plot(tmp_path / effect / name, effect).stat().st_size > 5000
    with pytest.raises(RequestError, match=r"\.png"):
        found.plot(tmp_path / "map.txt")


def test_the_bundled_probes_hold_their_subjects():
    from diffedit.text import locate

    for name in NAMES:
        probes = load_probes(name)
        assert len(probes) >= 8
        assert all(locate(prompt, subject) for prompt, subject in probes)
    with pytest.raises(UnknownNameError, match="object"):
        load_probes("objects")


def test_the_estimate_of_time_is_a_time(plain):
    locator = registry.configure("locators", "causal-trace", {"seeds": 1})
    assert 0 < estimate_seconds(locator.tracer(plain, [("a dog", "dog")])) < 600
    cheap = registry.configure("locators", "causal-trace", {"measure": "embedding"})
    assert estimate_seconds(cheap.tracer(plain, [("a dog", "dog")])) == 0


def command(model, *more):
    return ["trace", str(model), "--prompt", "a photo of a dog", "--prompt", "a dog", "--subject", "dog", *more]


def test_the_command_line(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, command(model, "--seeds", "2", "-o", "t", "--plot", "--json"))
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["units"] == 4 and len(document["states"]) == 18
    assert "units of up to" in found.stderr
    assert CausalTrace.load("t").total_effect.mean == pytest.approx(document["total_effect"]["mean"])
    assert (tmp_path / "t" / "heatmap.png").exists()
    again = CliRunner().invoke(app, command(model, "-o", "t", "--json"))
    assert again.exit_code == 2 and json.loads(again.stdout)["error"]["code"] == "DE-504"
    text = CliRunner().invoke(app, command(model, "-o", "u", "--component", "unet", "--set", 'kinds=["cross_attn"]'))
    assert text.exit_code == 0 and "cross_attn" in text.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--prompt", "a cat", "--subject", "dog"], "DE-102"),
        (["--prompt", "a dog"], "DE-100"),
        (["--prompt", "a dog", "--subject", "dog", "--probes", "object"], "DE-100"),
        (["--prompt", "a dog", "--subject", "dog", "--set", "noise=0"], "DE-100"),
        (["--prompt", "a dog", "--subject", "dog", "--set", "window=0"], "DE-100"),
        (["--prompt", "a dog", "--subject", "dog", "--set", "measure=image"], "DE-100"),
        (["--prompt", "a dog", "--subject", "dog", "--measure", "nothing"], "DE-200"),
        (["--prompt", "a dog", "--subject", "dog", "--component", "unet", "--measure", "embedding"], "DE-202"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else value,
)
def test_the_command_line_refuses(model, tmp_path, monkeypatch, arguments, code):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["trace", str(model), *arguments, "--json"])
    assert found.exit_code == 2 and json.loads(found.stdout)["error"]["code"] == code, found.output
    assert not (tmp_path / "trace").exists()


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(model, tmp_path):
    arguments = command(model, "--seeds", "3", "--json")
    one = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "one")])
    assert one.exit_code == 0
    done = launched([*arguments, "-o", str(tmp_path / "two")], tmp_path, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["units"] == 6  # exactly one document, from the first process
    assert same(CausalTrace.load(tmp_path / "one"), CausalTrace.load(tmp_path / "two"))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["trace.json", "trace.safetensors"]


REQUEST = make_request(subject="dog", target="cat")


def test_locogen_finds_a_planted_layer(plain):
    import torch

    layers = find_parts(plain.parts("unet"), ("cross_attn",))
    modules = dict(plain.model.pipeline.unet.named_modules())
    with torch.no_grad():
        for part in layers:
            if part is not layers[1]:
                modules[part.path].to_v.weight.zero_()
    found = check_locator(LocoGen(threshold=0.99), plain, [REQUEST])
    assert found.sites == tuple(sorted(layers[1].sites)) and len(found.sites) == 2
    assert found.method == "locogen" and len(found.scores) == 2


def test_locogens_window_grows_until_it_passes(plain):
    layers = find_parts(plain.parts("unet"), ("cross_attn",))
    whole = LocoGen(threshold=1.0).table(plain, [REQUEST], len(layers))
    assert whole.states[0].share == pytest.approx(1.0, abs=1e-6)
    assert np.isnan(whole.restored[:, 1:]).all()
    wide, narrow = LocoGen(threshold=0.999), LocoGen(threshold=0.05)
    assert len(wide.locate(plain, [REQUEST]).sites) > len(narrow.locate(plain, [REQUEST]).sites)
    with pytest.raises(NoCausalSiteError, match="no window of up to 1"):
        LocoGen(threshold=1.0, largest=1).locate(plain, [REQUEST])


def test_locogen_refuses_what_makes_no_sense(plain):
    with pytest.raises(RequestError, match="needs a target"):
        LocoGen().locate(plain, [make_request(subject="dog")])
    with pytest.raises(RequestError, match="at least one layer"):
        LocoGen().table(plain, [REQUEST], 0)
    with pytest.raises(NoCausalSiteError, match="look the same"):
        plain.model.pipeline.unet.apply(silence)
        LocoGen().locate(plain, [REQUEST])


def silence(module):
    if hasattr(module, "to_v"):
        module.to_v.weight.data.zero_()


def test_errors_reach_the_caller_before_any_run(editor, tmp_path):
    with pytest.raises(SubjectNotFoundError):
        editor.trace("a cat", "dog", out=tmp_path / "t")
    with pytest.raises(UnsupportedModelError):
        editor.trace("a dog", "dog", kinds=("resnet",), out=tmp_path / "t")
    with pytest.raises(RequestError, match="noise"):
        editor.trace("a dog", "dog", noise=0)
    with pytest.raises(RequestError, match="window"):
        editor.trace("a dog", "dog", window=0)
    assert not (tmp_path / "t").exists()
