"""Stock diffusers, PEFT and transformers load our adapters, and the text encoder then computes W + up @ down.

On a tiny random Stable Diffusion pipeline made from configuration. Each test has its control: without the adapter the
outputs are far from the expected ones.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffedit.io.files import EDIT_FILE
from diffedit.io.folder import write_folder
from diffedit.io.lora import KOHYA_FILE, kohya_file, peft_files
from diffedit.site import Role

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

HIDDEN, INNER, WORDS = 32, 48, 50
SHAPES = [
    (0, Role.TEXT_SELF_ATTN_OUT, HIDDEN, HIDDEN, 3),
    (1, Role.TEXT_SELF_ATTN_OUT, HIDDEN, HIDDEN, 1),
    (1, Role.TEXT_MLP_OUT, HIDDEN, INNER, 2),
]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def text_encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=WORDS - 2, eos_token_id=WORDS - 1, pad_token_id=WORDS - 1,
    )  # fmt: skip
    model = transformers.CLIPTextModel(config).eval()
    for parameter in model.parameters():  # CLIP's initialisation is so small that an edit would hardly show
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def pipeline(text_encoder: Any) -> Any:
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=HIDDEN, attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=copy.deepcopy(text_encoder), tokenizer=None, unet=unet,
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def output(model: Any) -> torch.Tensor:
    ids = torch.randint(0, WORDS - 2, (3, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out: torch.Tensor = model(ids).last_hidden_state
    return out


def module_of(model: Any, path: str) -> Any:
    """A module of this text encoder by its canonical name, in either layout of transformers."""
    root = getattr(model, "text_model", model)
    return root.get_submodule(path.removeprefix("text_model."))


@pytest.fixture(params=["sd1", "sd2"])
def edit(request: pytest.FixtureRequest, make_edit: Callable[..., Any]) -> Any:
    return make_edit(SHAPES, backend=request.param, scale=0.5)


@pytest.fixture
def expected(text_encoder: Any, edit: Any) -> torch.Tensor:
    """Outputs with W + up @ down written into the weights by hand."""
    model = copy.deepcopy(text_encoder)
    for place, change in edit.delta:
        module_of(model, place.path).weight.data += change.dense(torch.float32)
    out = output(model)
    assert (out - output(text_encoder)).abs().max() > 0.1
    return out


@pytest.fixture
def saved(edit: Any, tmp_path: Path) -> Path:
    """Everything in one folder, so that each loader has to pick the right file."""
    files = {
        EDIT_FILE: edit.data,
        KOHYA_FILE: kohya_file(edit.delta, edit.manifest),
        "README.md": b"# card\n",
        **peft_files(edit.delta, edit.manifest),
    }
    return write_folder(tmp_path / "edit", files)


def difference(model: Any, expected: torch.Tensor) -> float:
    return float((output(model) - expected).abs().max())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.utils.logging.set_verbosity(before)


@pytest.mark.parametrize("keywords", [{}, {"weight_name": KOHYA_FILE}])
def test_diffusers_loads_the_folder(keywords: Any, pipeline: Any, saved: Path, expected: torch.Tensor) -> None:
    plain = output(pipeline.text_encoder)
    pipeline.load_lora_weights(str(saved), **keywords)
    assert difference(pipeline.text_encoder, expected) < 1e-5
    pipeline.disable_lora()
    assert torch.equal(output(pipeline.text_encoder), plain)
    pipeline.enable_lora()
    pipeline.fuse_lora(components=["text_encoder"])
    pipeline.unload_lora_weights()
    assert difference(pipeline.text_encoder, expected) < 1e-5


def test_every_module_arrives_with_scale_one(pipeline: Any, saved: Path, edit: Any) -> None:
    """Diffusers drops keys that it does not know with a warning at most, so we count."""
    pipeline.load_lora_weights(str(saved), adapter_name="edit")
    layers = {
        name: module
        for name, module in pipeline.text_encoder.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    }
    companions = 3 * 2 if edit.manifest.base.backend == "sd2" else 0
    assert len(layers) == len(SHAPES) + companions
    assert {module.scaling["edit"] for module in layers.values()} == {1.0}
    for place, change in edit.delta:
        module = module_of(pipeline.text_encoder, place.path)
        dense = module.lora_B["edit"].weight @ module.lora_A["edit"].weight
        assert torch.allclose(dense.double(), change.dense(), atol=1e-6)


def test_half_the_edit(pipeline: Any, saved: Path, edit: Any, text_encoder: Any) -> None:
    model = copy.deepcopy(text_encoder)
    for place, change in edit.delta:
        module_of(model, place.path).weight.data += 0.5 * change.dense(torch.float32)
    pipeline.load_lora_weights(str(saved), adapter_name="edit")
    pipeline.set_adapters("edit", 0.5)
    assert difference(pipeline.text_encoder, output(model)) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_half_precision_files(
    dtype: torch.dtype, tolerance: float, pipeline: Any, edit: Any, expected: torch.Tensor, tmp_path: Path
) -> None:
    path = write_folder(tmp_path / "half", {KOHYA_FILE: kohya_file(edit.delta, edit.manifest, dtype=dtype)})
    pipeline.load_lora_weights(str(path))
    assert 1e-6 < difference(pipeline.text_encoder, expected) < tolerance


def test_peft_loads_the_folder(text_encoder: Any, saved: Path, expected: torch.Tensor) -> None:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(text_encoder), str(saved))
    assert difference(model, expected) < 1e-5
    assert sum(hasattr(module, "lora_A") for module in model.modules()) == len(SHAPES)
    merged = model.merge_and_unload()
    assert difference(merged, expected) < 1e-5
    assert type(merged) is type(text_encoder)


def test_transformers_loads_the_folder(text_encoder: Any, saved: Path, expected: torch.Tensor) -> None:
    model = copy.deepcopy(text_encoder)
    model.load_adapter(str(saved))
    assert difference(model, expected) < 1e-5


def test_peft_loads_into_the_nested_layout(saved: Path, edit: Any) -> None:
    """`CLIPTextModelWithProjection` still has the level `text_model`, as all had before transformers 5.6."""
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=WORDS - 2, eos_token_id=WORDS - 1, projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config).eval()
    assert "text_model.encoder.layers.0.self_attn.out_proj" in dict(model.named_modules())
    wanted = copy.deepcopy(model)
    for place, change in edit.delta:
        wanted.get_submodule(place.path).weight.data += change.dense(torch.float32)
    loaded = peft.PeftModel.from_pretrained(model, str(saved))
    assert difference(loaded, output(wanted)) < 1e-5
