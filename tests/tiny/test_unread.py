"""What an edit does not need is not read: proved with UNets and VAEs that cannot be, and by what is built."""

from __future__ import annotations

import functools
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from diffedit import Editor
from diffedit.backends.deferred import complete, unread
from diffedit.backends.loading import load_model
from diffedit.errors import ModelNotFoundError, UnsafeFormatError
from diffedit.site import Role
from tests.tiny import build, ldm, xl

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tokenizer_folder, tmp_path_factory):
    """A pipeline, and the folder and the single file that hold the same."""
    root = tmp_path_factory.mktemp("made")
    pipe = build.pipeline(tokenizer_folder)
    pipe.save_pretrained(root / "model")
    return pipe, root / "model", ldm.write(pipe, root / "model.safetensors")


@pytest.fixture(params=["folder", "file"])
def source(request, made):
    """Arguments of `Editor` for both kinds of source."""
    _, folder, file = made
    return ((folder,), {}) if request.param == "folder" else ((file,), {"config": str(folder)})


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made[1], tmp_path / "copy"))


@pytest.fixture
def built(monkeypatch):
    """Names of the classes of UNet and VAE that are built from now on."""
    seen = []
    for cls in (UNet2DConditionModel, AutoencoderKL):
        plain = cls.__init__

        @functools.wraps(plain)
        def init(self, *args, _plain=plain, _name=cls.__name__, **kwargs):
            seen.append(_name)
            _plain(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", init)
    return seen


def waiting(editor) -> bool:
    return unread(editor.backend.model.pipeline) is not None


def picture(editor) -> bytes:
    return editor.generate("a photo of a dog", seeds=3, steps=2)[0].tobytes()


def test_an_edit_builds_no_unet_and_no_vae_and_pictures_show_it_afterwards(made, source, built, tmp_path):
    whole = Editor(made[0])
    plain = picture(whole)
    args, options = source
    editor = Editor(*args, **options)
    edit = editor.ablate("dog")
    edit.save(tmp_path / "edit")
    edit.revert()
    editor.load(tmp_path / "edit")
    assert waiting(editor) and not built
    encoder = editor.backend.model.pipeline.text_encoder
    site = edit.delta.sites[0]
    weight = editor.backend.weight(site).clone()

    edited = picture(editor)
    assert sorted(built) == ["AutoencoderKL", "UNet2DConditionModel"] and not waiting(editor)
    assert editor.pipeline.text_encoder is encoder and torch.equal(editor.backend.weight(site), weight)
    assert edited != plain
    whole.load(edit)
    assert edited == picture(whole)
    whole.revert()
    editor.revert()
    assert picture(editor) == plain


def test_weights_that_cannot_be_read_do_not_matter_until_they_are_needed(copy, tmp_path):
    for part in ("unet", "vae"):
        file = copy / part / WEIGHTS
        file.write_bytes(b"\xff" * file.stat().st_size)
    editor = Editor(copy)
    edit = editor.ablate("dog", target="cat")
    edit.save(tmp_path / "edit")
    assert waiting(editor)
    for look in (
        picture,
        lambda e: e.pipeline,
        lambda e: e.backend.model.pipeline.vae,
        lambda e: e.backend.sites(*Role),
    ):
        with pytest.raises(ModelNotFoundError, match="cannot be loaded: 'copy'"):
            look(editor)
    assert waiting(editor) and editor.edits == (edit,)  # as it was
    edit.revert()


def test_what_is_completed_is_what_stock_diffusers_loads(made, source):
    args, options = source
    loaded = load_model(*args, **options).pipeline
    kind = type(loaded)
    assert kind is not StableDiffusionPipeline and isinstance(loaded, StableDiffusionPipeline)
    assert loaded.unet is not None and loaded.vae_scale_factor == 2  # the VAE's; without one it would be 8
    assert type(loaded) is StableDiffusionPipeline and unread(loaded) is None
    if not options:
        stock = StableDiffusionPipeline.from_pretrained(str(args[0]))
    else:
        stock = StableDiffusionPipeline.from_single_file(str(args[0]), **options)
    assert vars(loaded).keys() == vars(stock).keys()
    assert dict(loaded.config) == dict(stock.config)
    for name, part in stock.components.items():
        if isinstance(part, torch.nn.Module):
            mine = getattr(loaded, name).state_dict()
            assert all(torch.equal(mine[key], value) for key, value in part.state_dict().items())


def test_the_dtype_is_kept_for_what_is_read_later(source):
    args, options = source
    editor = Editor(*args, dtype=torch.float16, **options)
    assert editor.backend.model.pipeline.text_encoder.dtype == torch.float16 and waiting(editor)
    assert editor.pipeline.unet.dtype == torch.float16 and editor.pipeline.vae.dtype == torch.float16


def test_a_relative_path_survives_a_change_of_the_working_folder(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(copy.parent)
    editor = Editor("copy")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert editor.pipeline.unet is not None


def test_two_threads_complete_once(made, built):
    pipeline = load_model(made[1]).pipeline
    start, found = threading.Barrier(4), []

    def look():
        start.wait()
        found.append(pipeline.unet)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({id(unet) for unet in found}) == 1
    assert built.count("UNet2DConditionModel") == 1


def test_assigning_a_part_keeps_it(made, copy):
    editor = Editor(copy)
    other = made[0].unet
    editor.backend.model.pipeline.unet = other
    assert editor.pipeline.unet is other and not waiting(editor)


@pytest.mark.parametrize("change", ["replaced", "gone"])
def test_files_that_changed_meanwhile_are_an_error(copy, tmp_path, change):
    editor = Editor(copy)
    edit = editor.ablate("dog", target="cat")
    file = copy / "unet" / WEIGHTS
    if change == "replaced":
        os.utime(file, ns=(1, 1))
    else:
        file.unlink()
    for use in (picture, lambda e: e.save_pipeline(tmp_path / "out")):
        with pytest.raises(ModelNotFoundError, match=r"changed since it was opened.*[Uu]net, vae had not been read"):
            use(editor)
    assert not (tmp_path / "out").exists() and edit.applied
    edit.revert()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_what_was_not_read_writes_the_same_bytes(made, source, built, tmp_path):
    args, options = source
    lazy, eager = Editor(*args, **options), Editor(*args, **options)
    complete(eager.backend.model.pipeline)
    built.clear()
    for name, editor in (("lazy", lazy), ("eager", eager)):
        editor.ablate("dog", target="cat")
        editor.save_pipeline(tmp_path / name if not options else tmp_path / f"{name}.safetensors")
    assert waiting(lazy) and not built
    if options:
        assert (tmp_path / "lazy.safetensors").read_bytes() == (tmp_path / "eager.safetensors").read_bytes()
        lazy.save_pipeline(tmp_path / "folder")  # has to convert, and so to read
        assert not waiting(lazy) and Editor(tmp_path / "folder").pipeline.unet is not None
    else:
        assert tree(tmp_path / "lazy") == tree(tmp_path / "eager")


def no_unet(folder):
    shutil.rmtree(folder / "unet")


def pickle_only(folder):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def no_weights(folder):
    (folder / "vae" / WEIGHTS).unlink()


def no_config(folder):
    (folder / "unet" / "config.json").unlink()


def odd_config(folder):
    (folder / "vae" / "config.json").write_text("[1]", encoding="utf-8")


def no_shard(folder):
    (folder / "unet" / WEIGHTS).unlink()
    listing = {"weight_map": {"x": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(listing), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (no_unet, ModelNotFoundError, "a part of the model is missing: 'unet'"),
        (pickle_only, UnsafeFormatError, "as a pickle only: 'unet'"),
        (no_weights, ModelNotFoundError, "has no weights: 'vae'"),
        (no_config, ModelNotFoundError, r"unet/config\.json\. It is not there"),
        (odd_config, ModelNotFoundError, r"no JSON object: vae/config\.json"),
        (no_shard, ModelNotFoundError, r"a shard is missing: unet/.*00001-of-00002"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_can_be_seen_without_reading_is_said_at_once(copy, damage, error, message):
    damage(copy)
    with pytest.raises(error, match=message):
        Editor(copy)


@pytest.mark.parametrize(("part", "prefix"), [("unet", "model.diffusion_model."), ("vae", "first_stage_model.")])
def test_a_single_file_without_a_part_is_refused_at_once(made, tmp_path, part, prefix):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "part.safetensors"
    save_file({key: value for key, value in load_file(made[2]).items() if not key.startswith(prefix)}, file)
    with pytest.raises(ModelNotFoundError, match=f"the checkpoint holds no {part}: 'part.safetensors'"):
        Editor(file, config=str(made[1]))


def test_a_single_file_needs_nothing_from_the_network(made, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    editor = Editor(made[2], config=str(made[1]))
    editor.ablate("dog", target="cat")
    assert editor.pipeline.unet is not None


def test_a_model_with_two_text_encoders_waits_too(tokenizer_folder, built, tmp_path):
    pipe = xl.pipeline(tokenizer_folder)
    pipe.save_pretrained(tmp_path / "xl")
    built.clear()
    editor = Editor(tmp_path / "xl")
    edit = editor.ablate("dog", target="cat")
    first, second = (getattr(editor.backend.model.pipeline, name) for name in ("text_encoder", "text_encoder_2"))
    assert waiting(editor) and not built
    assert {site.component for site in edit.delta.sites} == {"text_encoder", "text_encoder_2"}
    assert editor.pipeline.text_encoder is first and editor.pipeline.text_encoder_2 is second
    assert "UNet2DConditionModel" in built
