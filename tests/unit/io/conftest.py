"""Edits to write and read, built without any model, and one thread for torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from diffedit.delta import Delta, LowRank
from diffedit.io.files import delta_to_tensors, encode_edit
from diffedit.io.manifest import BaseRecord, Manifest, PluginRecord, SiteRecord
from diffedit.io.records import tensor_records
from diffedit.request import Request
from diffedit.site import EditSite, Role, TokenRule

PATHS = {Role.TEXT_SELF_ATTN_OUT: "self_attn.out_proj", Role.TEXT_MLP_OUT: "mlp.fc2"}
CROSS = {Role.UNET_CROSS_ATTN_K: "to_k", Role.UNET_CROSS_ATTN_V: "to_v"}
UNET = {
    Role.UNET_SELF_ATTN: "attentions.0.transformer_blocks.0.attn1.to_q",
    Role.UNET_FEED_FORWARD: "attentions.0.transformer_blocks.0.ff.net.2",
    Role.UNET_TIME: "resnets.0.time_emb_proj",
    Role.UNET_PROJECTION: "attentions.0.proj_in",
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def site(layer: int, role: Role, d_out: int, d_in: int, component: str = "text_encoder") -> EditSite:
    if role in CROSS:
        path = f"down_blocks.{layer}.attentions.0.transformer_blocks.0.attn2.{CROSS[role]}"
        return EditSite("unet", path, layer, role, d_out, d_in)
    if role in UNET:
        return EditSite("unet", f"down_blocks.{layer}.{UNET[role]}", layer, role, d_out, d_in)
    return EditSite(component, f"text_model.encoder.layers.{layer}.{PATHS[role]}", layer, role, d_out, d_in)


@dataclass(frozen=True)
class MadeEdit:
    delta: Delta
    manifest: Manifest
    tensors: dict[str, torch.Tensor]
    data: bytes


def build(
    shapes: Sequence[tuple[int, Role, int, int, int]] = ((0, Role.TEXT_SELF_ATTN_OUT, 3, 2, 1),),
    *,
    seed: int = 0,
    backend: str = "sd1",
    source: str = "some-user/some-model",
    component: str = "text_encoder",
    requests: Sequence[dict[str, Any]] = ({"subject": "cat", "target": "dog", "templates": ("{}",)},),
    settings: dict[str, Any] | None = None,
    scale: float = 1.0,
) -> MadeEdit:
    """An edit with random factors; `shapes` lists (layer, role, d_out, d_in, rank)."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer, role, d_out, d_in, rank in shapes:
        up = torch.randn(d_out, rank, generator=generator) * scale
        factors[site(layer, role, d_out, d_in, component)] = LowRank(up, torch.randn(rank, d_in, generator=generator))
    return finish(Delta(factors), backend=backend, source=source, requests=requests, settings=settings)


def finish(
    delta: Delta,
    *,
    backend: str = "sd1",
    source: str = "some-user/some-model",
    requests: Sequence[dict[str, Any]] = ({"subject": "cat", "target": "dog", "templates": ("{}",)},),
    settings: dict[str, Any] | None = None,
) -> MadeEdit:
    digest = hashlib.sha256(b"weight").hexdigest()
    tensors = delta_to_tensors(delta)
    manifest = Manifest(
        requests=tuple(Request(**fields) for fields in requests),
        target_reasons=("given",) * len(requests),
        tokens=TokenRule.LAST_SUBJECT,
        locator=PluginRecord(name="fixed", reference="none", settings={"layer": 0}),
        updater=PluginRecord(name="quickfix", reference="none", settings=settings or {"lam": 0.1}),
        sites=tuple(
            SiteRecord(
                **vars(place),
                rank=change.rank,
                relative_norm=0.25,
                base_sha256={"float32": digest},
                result_sha256=digest,
                achieved=1.0,
                dtype="float32",
                diagnostics={"condition": 12.5, "effective_rank": 1.0, "residual": 0.125, "preserve_drift": 0.0},
            )
            for place, change in delta
        ),
        base=BaseRecord(source=source, revision=None, backend=backend, fingerprints={"tokenizer": digest}),
        versions={"diffedit": "0.1.0"},
        tensors=tensor_records(tensors),
    ).with_id()
    return MadeEdit(delta, manifest, tensors, encode_edit(manifest, tensors))


@pytest.fixture(scope="session")
def make_edit() -> Callable[..., MadeEdit]:
    return build


@pytest.fixture(scope="session")
def finish_edit() -> Callable[..., MadeEdit]:
    return finish


@pytest.fixture(scope="session")
def tiny() -> MadeEdit:
    """The smallest edit: one site, rank 1, five numbers."""
    return build()


def reframe(header: Any, payload: bytes, canonical: bool = True) -> bytes:
    """A file from a header document and data, with no other check than that JSON can hold it."""
    text = json.dumps(header, sort_keys=canonical, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


@pytest.fixture(scope="session")
def frame() -> Callable[..., bytes]:
    return reframe


def split_file(data: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.fixture(scope="session")
def split() -> Callable[[bytes], tuple[Any, bytes]]:
    return split_file


def forge_manifest(data: bytes, content: Any) -> bytes:
    """The file with another manifest and every hash of it made right again: what a skilled forger would hand over."""
    header, payload = split_file(data)

    def canonical(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    if isinstance(content, dict) and "edit_id" in content:
        without = {key: value for key, value in content.items() if key != "edit_id"}
        content = dict(content, edit_id=hashlib.sha256(canonical(without).encode("utf-8", "replace")).hexdigest())
    digest = hashlib.sha256(canonical(content).encode("utf-8", "replace")).hexdigest()
    header["__metadata__"] = {"diffedit": canonical({"manifest": content, "sha256": digest})}
    return reframe(header, payload)


@pytest.fixture(scope="session")
def forge() -> Callable[[bytes, Any], bytes]:
    return forge_manifest
