"""What a layer usually reads: the second moment of its inputs over bundled everyday captions, kept by content.

    C = (1 / N) sum_p sum_t k_pt k_pt^T,        k_pt  [d], the input at token t of caption p

over all tokens from the begin-of-text token to the end-of-text token. All of the padding would outweigh them:
`second_moment` leaves it out, `everyday_metric` takes about as much of it as there is text. Captions run in small
batches and only the moment is kept (`linalg.moments`).

Computing it costs more than the edit that needs it, so it can be kept in a folder, in a file whose name is the hash of
everything it depends on: the captions as tokens, the site, and every weight of the site's component. A file of another
model or of changed weights is simply never found. Files are written beside their place and renamed.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262) use 100,000 samples of Wikipedia. Limits: a thousand bundled captions
are fewer words than that; where they span fewer directions than the layer has inputs, a ridge has to fill in.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from diffedit.errors import MalformedArtifactError, RequestError, StorageError
from diffedit.interfaces import Backend
from diffedit.linalg.metric import Metric
from diffedit.linalg.moments import SecondMoment
from diffedit.site import EditSite, SubjectSpan

_BATCH = 50
_PADDING = 12
_ROWS = 4096
_SAMPLES = 8
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_VERSION = "diffedit-moment-1"


@cache
def _lists() -> dict[str, tuple[str, ...]]:
    text = (files("diffedit") / "assets" / "prompts" / "captions.txt").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("[") and line.endswith("]"):
            entries = found.setdefault(line[1:-1], [])
        elif line.strip() and not line.startswith("#"):
            entries.append(line.strip())
    return {name: tuple(entries) for name, entries in found.items()}


def captions() -> Iterator[str]:
    """Everyday captions without end; the first 16,907 all differ.

    >>> next(captions())
    'a bowl of soup on a table'
    """
    lists = _lists()
    forms, things, places = lists["forms"], lists["things"], lists["places"]
    n = 0
    while True:
        yield forms[n % len(forms)].format(things[n % len(things)], places[n % len(places)])
        n += 1


def second_moment(backend: Backend, site: EditSite, count: int, cache_dir: Path | None = None) -> SecondMoment:
    """The moment of a site's inputs over the first `count` captions.

    Args:
        backend: the model.
        site: whose inputs.
        count: captions; more know the layer better and take longer.
        cache_dir: folder to find it in or to keep it in; `None` computes it.

    Raises:
        RequestError: no captions.
        MalformedArtifactError: the kept file is damaged.
        StorageError: the file system refused.
    """
    if count < 1:
        raise RequestError("a second moment needs captions", value=count)
    prompts = list(islice(captions(), count))
    path = None if cache_dir is None else cache_dir / f"{_digest(backend, site, prompts)}.safetensors"
    if path is not None and path.exists():
        return _read(path)
    moment = SecondMoment(site.d_in)
    waiting: list[Tensor] = []
    for start in range(0, count, _BATCH):
        batch = prompts[start : start + _BATCH]
        inputs = backend.capture(batch, [site]).inputs[site]
        waiting += [inputs[row, : span.eos + 1] for row, span in enumerate(_spans(backend, batch))]
        if sum(map(len, waiting)) >= _ROWS or start + _BATCH >= count:
            moment.add(torch.cat(waiting))
            waiting = []
    if path is not None:
        _write(path, moment)
    return moment


def everyday_metric(backend: Backend, site: EditSite, count: int, lam: float, weight: float) -> Metric:
    """The price lam I + weight C, C the second moment over the first `count` captions; without captions lam I.

    It is kept with the backend for as long as the weights that it depends on stay as they are, if those can be seen.
    """
    if not count:
        return Metric.build(lam, None, site.d_in)
    state = _state(backend, site)
    key = "everyday", site, count, lam, weight, state
    known = backend.statistics.get(key) if state else None
    if known is None:
        known = Metric.of_inputs(lam, weight, _inputs(backend, site, count)).kept()
        for old in [k for k in backend.statistics if k[:2] == key[:2]]:
            del backend.statistics[old]
        if state:
            backend.statistics[key] = known
    found: Metric = known
    return found


def _inputs(backend: Backend, site: EditSite, count: int) -> Iterator[Tensor]:
    """The site's inputs [n, d_in] at the captions' tokens and some of their padding, some captions at a time.

    The image model reads the padding too, backgrounds above all, so it has to be held as well; but there is far more of
    it than text, so only some positions of each caption are taken, evenly spread, other ones each time: `_PADDING` or a
    few more.
    """
    prompts = list(islice(captions(), count))
    length = backend.positions(prompts[0], site)
    for start in range(0, count, _BATCH):
        places = []
        for i, span in enumerate(_spans(backend, prompts[start : start + _BATCH]), start):
            places += [(span, position) for position in range(span.eos + 1)]
            step = max(1, (length - span.eos - 1) // _PADDING)
            places += [(span, position) for position in range(span.eos + 1 + i % step, length, step)]
        yield backend.read(places, [site], padded=True).inputs[site]


def _state(backend: Backend, site: EditSite) -> tuple[object, ...]:
    """What changes when a weight changes that the site's input may depend on: all up to its layer, but for its own.

    Torch counts writes to a tensor, but not those that go past it (`.data`); a few numbers of each show most of these.
    """
    component: Any = getattr(backend.model.pipeline, site.component, None)
    own = site.path.rsplit(".encoder.", 1)[-1] + "."
    parts = [] if component is None else [(n, t) for n, t in _up_to(component, site.layer) if own not in n]
    if not parts:
        return ()
    with torch.no_grad():
        numbers = torch.cat([_sample(tensor) for _, tensor in parts]).tolist()
    return tuple((name, id(tensor), tensor.data_ptr(), tensor._version) for name, tensor in parts), tuple(numbers)


def _sample(tensor: Tensor) -> Tensor:
    """A few of the numbers, evenly spread."""
    flat = tensor.reshape(-1)
    step = max(1, len(flat) // _SAMPLES)
    return flat[: _SAMPLES * step : step].cpu().float()


def _up_to(module: nn.Module, layer: int, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, without those of later layers."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in module._modules.items():
        inner = f"{prefix}{name}."
        at = _LAYER.search(inner)
        if child is not None and (at is None or int(at[1]) <= layer):
            yield from _up_to(child, layer, inner)


def _spans(backend: Backend, prompts: list[str]) -> list[SubjectSpan]:
    """The spans of the captions' first words: any word's span knows where its prompt ends."""
    return backend.spans([(prompt, prompt.split()[0], 0) for prompt in prompts])


def _digest(backend: Backend, site: EditSite, prompts: list[str]) -> str:
    digest = hashlib.sha256(repr((_VERSION, site, prompts, sorted(backend.fingerprints().items()))).encode("utf-8"))
    component: Any = getattr(backend.model.pipeline, site.component)
    for name, tensor in sorted(component.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> SecondMoment:
    try:
        with safe_open(path, "pt") as file:
            return SecondMoment.restore(file.get_tensor("root"), int(file.get_tensor("count")))
    except OSError as error:
        raise StorageError("the second moment cannot be read", value=str(path), cause=str(error)) from error
    except (SafetensorError, RuntimeError, ValueError, RequestError) as error:
        hint = "delete it; it is computed again"
        said = "the kept second moment is damaged"
        raise MalformedArtifactError(said, value=str(path), cause=str(error), hint=hint) from error


def _write(path: Path, moment: SecondMoment) -> None:
    data = save({"root": moment.total_root.cpu().contiguous(), "count": torch.tensor(moment.count)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        hint = "choose another cache_dir"
        raise StorageError("the second moment cannot be kept", value=str(path), cause=str(error), hint=hint) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
