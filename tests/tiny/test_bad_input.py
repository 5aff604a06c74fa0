"""Proves that every kind of bad input is one clear `DiffEditError` that shows the value, and that model and files stay
as they were."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffedit import Editor
from diffedit.edit import Edit
from diffedit.errors import (
    ArtifactError,
    ContradictionError,
    DiffEditError,
    EmptySubjectError,
    IntegrityError,
    MalformedArtifactError,
    ModelNotFoundError,
    NonFiniteError,
    NoOpError,
    OutputExistsError,
    RequestError,
    StorageError,
    SubjectTruncatedError,
    UnknownNameError,
    UnsafeFormatError,
    UnsupportedModelError,
)
from diffedit.locators.fixed import FixedLocator
from diffedit.request import make_request
from diffedit.testing import model_state
from tests.tiny import build


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


LONG = "x " * 80 + "dog"
REQUESTS = {
    "empty": (lambda e: e.ablate(""), EmptySubjectError, "the subject is empty: ''"),
    "blank": (lambda e: e.ablate(" \t\n"), EmptySubjectError, r"the subject is empty: ' \\t\\n'"),
    "invisible": (lambda e: e.ablate("\u200b"), EmptySubjectError, "the subject is empty"),
    "empty in a list": (lambda e: e.ablate(["dog", ""], target="cat"), EmptySubjectError, "the subject is empty: ''"),
    "no subject": (lambda e: e.ablate([]), RequestError, r"there is no subject: \[\]"),
    "none": (lambda e: e.ablate(None), RequestError, "the subject must be text: NoneType"),
    "number": (lambda e: e.ablate(5), RequestError, "the subject must be text: int"),
    "number in a list": (lambda e: e.ablate(["dog", 5], target="cat"), RequestError, "must be text: int"),
    "list to update": (lambda e: e.update(["dog"], "cat"), RequestError, "the subject must be text: list"),
    "twice": (lambda e: e.ablate(["dog", "a Dog"], target="cat"), RequestError, "given twice: dog"),
    "no request": (lambda e: e.run([]), RequestError, "nothing to edit"),
    "special token": (lambda e: e.ablate("<|endoftext|>"), RequestError, "special token"),
    "empty target": (lambda e: e.ablate("dog", target=" "), EmptySubjectError, "the target is empty: ' '"),
    "its own target": (lambda e: e.update("dog", "the Dog"), ContradictionError, "the target is the subject: 'Dog'"),
    "blank preserve": (lambda e: e.ablate("dog", preserve=[""]), EmptySubjectError, "the preserve entry is empty"),
    "preserve a number": (lambda e: e.ablate("dog", preserve=5), RequestError, "preserve must be a list of names: 5"),
    "preserve text": (lambda e: e.ablate("dog", preserve="fox"), RequestError, "a list of names: 'fox'"),
    "preserve a subject": (
        lambda e: e.ablate(["dog", "fox"], target="cat", preserve=["fox"]),
        ContradictionError,
        "'fox'",
    ),
    "preserve that can be read once only": (
        lambda e: e.ablate(["dog", "fox"], target="cat", preserve=iter(["owl"])),
        RequestError,
        "preserve must be a list",
    ),
    "templates as text": (lambda e: e.ablate("dog", templates="a {}"), RequestError, "templates is not valid: 'a {}'"),
    "aliases of many": (lambda e: e.ablate(["dog", "fox"], aliases=["pup"]), RequestError, "one subject"),
    "template without a place": (lambda e: e.ablate("dog", templates=["a photo"]), RequestError, "'a photo'"),
    "template that glues": (
        lambda e: e.ablate("dog", target="cat", templates=["hot{}s"]),
        RequestError,
        "no whole word.*hot",
    ),
    "beyond 77 tokens": (
        lambda e: e.ablate(LONG, target="cat"),
        SubjectTruncatedError,
        r"77 tokens: \d+ tokens",
    ),
    "template beyond 77 tokens": (
        lambda e: e.ablate("dog", target="cat", templates=["y " * 80 + "{}"]),
        SubjectTruncatedError,
        "'cat' is cut off|'dog' is cut off",
    ),
    "unknown updater": (lambda e: e.ablate("dog", updater="quickfx"), UnknownNameError, "'quickfx'.*'quickfix'"),
    "unknown locator": (lambda e: e.ablate("dog", locator="fixd"), UnknownNameError, "'fixd'.*'fixed'"),
    "locator as updater": (lambda e: e.ablate("dog", updater=FixedLocator()), UnknownNameError, "FixedLocator"),
    "no such layer": (
        lambda e: e.ablate("dog", target="cat", locator=FixedLocator(layer=9)),
        UnsupportedModelError,
        "layer 9.*from 0 to 2",
    ),
    "no weight at all": (
        lambda e: e.ablate("dog", target="cat", updater=build.plain(subject_weight=0)),
        RequestError,
        "no token pairs",
    ),
    "contradiction": (
        lambda e: e.run(
            [make_request(subject="dog", target="owl"), make_request(subject="cat", target="fox")],
            updater=build.plain(),
        ),
        ContradictionError,
        "same key",
    ),
    "no change": (lambda e: e.ablate("dog", target="cat"), NoOpError, "already does"),
}
# "dog" and "cat" are one token each; giving them one embedding makes them the same to the model.
TWINS = {"contradiction", "no change"}


@pytest.mark.parametrize("case", REQUESTS)
def test_requests(sd1, case):
    work, error, message = REQUESTS[case]
    if case in TWINS:
        ids = sd1.tokenizer(["dog", "cat"]).input_ids
        assert [len(i) for i in ids] == [3, 3]
        with torch.no_grad():
            table = sd1.text_encoder.embeddings.token_embedding.weight
            table[ids[1][1]] = table[ids[0][1]]
    editor = Editor(sd1)
    before = model_state(sd1)
    with pytest.raises(error, match=message):
        work(editor)
    assert model_state(sd1) == before and editor.edits == ()


@pytest.mark.parametrize("case", ["weight", "embedding"])
def test_a_model_with_nan_is_refused(sd1, case):
    block = sd1.text_encoder.encoder.layers[0]
    with torch.no_grad():
        if case == "weight":
            block.self_attn.out_proj.weight[1, 2] = float("nan")
        else:
            block.layer_norm1.weight[0] = float("inf")
    before = model_state(sd1)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.out_proj is not finite: \d+ numbers"):
        Editor(sd1).ablate("dog", target="cat")
    assert model_state(sd1) == before


def test_an_edit_into_a_model_with_nan_is_refused(sd1, tmp_path):
    folder = Editor(copy.deepcopy(sd1)).ablate("dog", target="cat").save(tmp_path / "edit")
    with torch.no_grad():
        sd1.text_encoder.encoder.layers[0].self_attn.out_proj.weight[1, 2] = float("nan")
    with pytest.raises(DiffEditError, match="out_proj"):
        Editor(sd1).load(folder)


def test_an_edit_of_a_weight_that_is_zero_is_refused(sd1):
    weight = sd1.text_encoder.encoder.layers[0].self_attn.out_proj.weight
    with torch.no_grad():
        weight.zero_()
    editor = Editor(sd1)
    with pytest.raises(UnsupportedModelError, match="out_proj is zero"):
        editor.ablate("dog", target="cat")
    assert not weight.any() and editor.edits == ()


def _folder(tmp_path, **files) -> Path:
    folder = tmp_path / "model"
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


class Bomb:
    """A pickle that leaves a file when it is opened."""

    def __reduce__(self):
        return (os.mkdir, ("opened-the-pickle",))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("builtin:emojy", UnknownNameError, "'emojy'.*'emoji'"),
        ("builtin:", UnknownNameError, "''"),
        ("emoji", ModelNotFoundError, "'emoji'.*'builtin:emoji'"),
        ("no/such/folder", ModelNotFoundError, "'no/such/folder'"),
        ("missing.safetensors", ModelNotFoundError, "'missing.safetensors'"),
        ("~nobody-of-that-name/model", ModelNotFoundError, "~nobody"),
        ("x" * 5000, ModelNotFoundError, "xxx"),
        ("nul\0byte", ModelNotFoundError, "nul"),
        (None, ModelNotFoundError, "not a model: NoneType"),
        (5, ModelNotFoundError, "not a model: int"),
        ([], ModelNotFoundError, "not a model: list"),
        (torch.nn.Linear(1, 1), ModelNotFoundError, "not a model: Linear"),
        (build.fake_pipeline(), UnsupportedModelError, "no backend accepts the model: SimpleNamespace"),
    ],
    ids=lambda v: repr(v)[:30] if not isinstance(v, type) else "",
)
def test_what_is_no_model(model, error, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        Editor(model)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin", "pkl", "CKPT"])
def test_a_pickle_is_never_opened(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    before = snapshot(tmp_path)
    with pytest.raises(UnsafeFormatError, match=rf"pickle.*'model\.{suffix}'"):
        Editor(path)
    with pytest.raises(UnsafeFormatError):
        Editor(path).load(path)
    assert snapshot(tmp_path) == before


def test_a_pickle_with_another_name_is_not_opened_either(tmp_path, monkeypatch, sd1):
    monkeypatch.chdir(tmp_path)
    for name, error in (("edit.safetensors", UnsafeFormatError), ("model.zip", UnsafeFormatError)):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(error):
            Editor(sd1).load(tmp_path) if name == "edit.safetensors" else Editor(tmp_path / name)
    assert "opened-the-pickle" not in snapshot(tmp_path)


def test_a_folder_with_pickles_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    folder = _folder(tmp_path, model_index_DOT_json=b"{}", unet__model_DOT_bin=bomb, vae__model_DOT_bin=bomb)
    before = snapshot(tmp_path)
    with pytest.raises(UnsafeFormatError, match=r"pickles only: 'model\.bin'.*safe_serialization=True"):
        Editor(folder)
    assert snapshot(tmp_path) == before


def test_a_folder_where_one_part_is_a_pickle(tmp_path, monkeypatch, sd1):
    monkeypatch.chdir(tmp_path)
    sd1.save_pretrained(tmp_path / "model")
    (tmp_path / "model/text_encoder/model.safetensors").unlink()
    (tmp_path / "model/text_encoder/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DiffEditError, match="'model'"):
        Editor(tmp_path / "model")
    assert "opened-the-pickle" not in snapshot(tmp_path)


def test_a_folder_without_a_model(tmp_path):
    folder = _folder(tmp_path, notes_DOT_txt=b"hello")
    with pytest.raises(ModelNotFoundError, match=r"model_index.json is missing.*save_pretrained"):
        Editor(folder)


def test_a_folder_with_a_broken_index(tmp_path):
    folder = _folder(tmp_path, model_index_DOT_json=b"{ broken")
    with pytest.raises(ModelNotFoundError, match="cannot be loaded: 'model'"):
        Editor(folder)


@pytest.mark.parametrize("text", [b"{ broken", b"[]", b"\xff\xfe", b'{"objects": 5}', b'{"templates": {"object": 1}}'])
def test_a_folder_with_a_broken_vocabulary(tmp_path, sd1, text):
    sd1.save_pretrained(tmp_path / "model")
    (tmp_path / "model/vocabulary.json").write_bytes(text)
    with pytest.raises(DiffEditError, match="vocabulary"):
        Editor(tmp_path / "model")


def test_a_folder_that_is_an_edit(tmp_path, sd1):
    folder = Editor(sd1).ablate("dog", target="cat").save(tmp_path / "edit")
    with pytest.raises(ModelNotFoundError, match=r"It holds an edit.*editor\.load"):
        Editor(folder)


def test_a_hub_id_that_cannot_be_reached(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"'nobody/no-such-model'.*HF_HUB_OFFLINE"):
        Editor("nobody/no-such-model")


@pytest.mark.parametrize(
    ("backend", "error", "message"), [("sd9", UnknownNameError, "'sd9'"), ("sd2", UnsupportedModelError, "tried sd2")]
)
def test_a_backend_that_does_not_fit(sd1, backend, error, message):
    with pytest.raises(error, match=message):
        Editor(sd1, backend=backend)


@pytest.fixture
def saved(sd1, tmp_path):
    """A pristine model, an edit made on a copy of it, and the edit's folder."""
    edit = Editor(copy.deepcopy(sd1)).ablate("dog", target="cat")
    return sd1, edit, edit.save(tmp_path / "edit")


def test_output_that_is_there_already_stays(saved, tmp_path):
    _, edit, folder = saved
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me", encoding="utf-8")
    (tmp_path / "file").write_text("keep me", encoding="utf-8")
    before = snapshot(tmp_path)
    for path, overwrite in (
        (folder, False),
        (tmp_path / "mine", False),
        (tmp_path / "mine", True),
        (tmp_path / "file", True),
    ):
        with pytest.raises(OutputExistsError, match=path.name):
            edit.save(path, overwrite=overwrite)
        assert snapshot(tmp_path) == before
    edit.save(folder, overwrite=True)  # control
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "rename"])
def test_output_that_cannot_be_written_leaves_nothing(saved, tmp_path, monkeypatch, number, call):
    """The tests may run as root, who ignores file modes: so the calls themselves fail."""
    _, edit, _ = saved
    before = snapshot(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match=rf"new.*{os.strerror(number)}"):
        edit.save(tmp_path / "new")
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    assert edit.applied


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_edit_is_refused(saved, share):
    model, _, folder = saved
    path, before = folder / "edit.safetensors", model_state(model)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    for attempt in (lambda: Edit.load(folder), lambda: Editor(model).load(folder)):
        with pytest.raises(MalformedArtifactError, match=r"edit\.safetensors"):
            attempt()
    assert model_state(model) == before


def test_a_flipped_bit_anywhere_is_refused(saved):
    """Every 61st bit of the file; stock safetensors would load most of them."""
    model, edit, folder = saved
    path, before = folder / "edit.safetensors", model_state(model)
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 61 * (1 + len(data) // 4000)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(broken))
        with pytest.raises(ArtifactError) as caught:
            Editor(model).load(folder)
        assert isinstance(caught.value, MalformedArtifactError | IntegrityError | DiffEditError)
    assert model_state(model) == before
    path.write_bytes(data)
    assert Editor(model).load(folder).id == edit.id  # control


def test_what_is_no_edit(sd1, tmp_path):
    editor, before = Editor(sd1), model_state(sd1)
    save_file({"x": torch.ones(2)}, tmp_path / "lora.safetensors")
    (tmp_path / "empty").mkdir()
    for path, error, message in (
        (tmp_path / "missing", StorageError, "no such file or folder.*missing"),
        (tmp_path / "empty", StorageError, r"holds no edit\.safetensors.*empty"),
        (tmp_path / "lora.safetensors", ArtifactError, r"lora\.safetensors"),
        ("x" * 5000, DiffEditError, "xxx"),
        ("~nobody-of-that-name/edit", DiffEditError, "nobody"),
        (None, DiffEditError, "None"),
        (5, DiffEditError, "int|5"),
    ):
        with pytest.raises(error, match=message):
            editor.load(path)
    assert model_state(sd1) == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": None},
        {"prompts": [5]},
        {"prompts": "a dog", "seeds": 1.5},
        {"prompts": "a dog", "seeds": ["one"]},
        {"prompts": "a dog", "steps": 0},
        {"prompts": "a dog", "batch_size": 0},
    ],
    ids=lambda value: ", ".join(f"{key}={item!r}" for key, item in value.items()),
)
def test_generate_refuses_what_it_cannot_draw(sd1, arguments):
    with pytest.raises(RequestError):
        Editor(sd1).generate(**arguments)
