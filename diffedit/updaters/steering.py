"""Which output of one layer would make the subject's prompts mean the target: found by gradients, on no weight.

The layer's output at the subject's token is moved by one vector delta, the same in all prompts of the subject, and the
text encoder runs on from there. What it then makes of each prompt i, its states and their summary E_i (the end-of-text
state, projected where the encoder has a projection), an *aim* turns into a loss:

    delta = argmin aim(E_1, E_2, ...) + decay |delta| / |v|^2        with |delta| <= clamp |v|

with v what is there now, |.| the Euclidean norm. Adam; stops once the aim says that it is near `enough`. The aim of
ReFACT is here, a contrast with the frozen summaries of the target g_i and of everything it must not become:

    p_i = softmax(-|E_i - g_i| / tau, -|E_i - n_1| / tau, ...)[0],        aim = -mean_i log p_i

with the subject's own meaning always among the n_j. The aim of EMCID is in `emcid`.

Source: Arad et al. 2024 (ReFACT, arXiv 2306.00738), text contrast with the l2 distance. Differs: encoders without a
projection (Stable Diffusion 1.x and 2.x ship none) are read at the unprojected end-of-text state; tau is a setting;
with several prompts of the subject each has its own target prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffedit.errors import NonFiniteError, NoOpError, RequestError, UnsupportedModelError
from diffedit.interfaces import Backend
from diffedit.request import Request
from diffedit.site import EditSite, Role
from diffedit.updaters.layers import layer_of


@dataclass(frozen=True)
class Descent:
    """How delta is looked for; see the module's text.

    Attributes:
        steps: at most so many.
        learning_rate: of Adam.
        decay: larger keeps delta small.
        clamp: largest |delta| in units of |v|.
        temperature: tau, of the contrast.
        enough: how near the aim to stop; 1 is never passed.
    """

    steps: int
    learning_rate: float
    decay: float
    clamp: float
    temperature: float = 1.0
    enough: float = 1.0


@dataclass(frozen=True, eq=False)
class Steered:
    """What was found.

    Attributes:
        delta: [d_out], float64.
        before: how near the aim the prompts are without it; for the contrast the mean probability of the target.
        after: with it.
        steps: taken.
    """

    delta: Tensor
    before: float
    after: float
    steps: int


@dataclass(frozen=True, eq=False)
class Understood:
    """What the encoder makes of b prompts.

    Attributes:
        summaries: [b, d], float32.
        states: [b, t, d], what the image model conditions on.
    """

    summaries: Tensor
    states: Tensor


@dataclass(frozen=True, eq=False)
class Fact:
    """One name of a subject that is to mean something else.

    Attributes:
        name: the subject's name or an alias.
        target: what it is to mean.
        prompts: b prompts with the name.
        positions: of the name's last token in each.
        goals: the same prompts with the target.
        wanted: [b, d], summaries of the goals.
        present: [b, d], summaries of the prompts.
    """

    name: str
    target: str
    prompts: tuple[str, ...]
    positions: tuple[int, ...]
    goals: tuple[str, ...]
    wanted: Tensor
    present: Tensor


Aim = Callable[[Understood], tuple[Tensor, float]]
"""Loss (a scalar), and how near it is: 1 is there."""


def check_one_encoder(backend: Backend, updater: str) -> None:
    """Refuse a model with several text encoders, of which none alone says what a prompt means.

    Raises:
        UnsupportedModelError: it is one.
    """
    encoders = sorted({site.component for site in backend.sites(Role.TEXT_MLP_OUT)})
    if len(encoders) > 1:
        said = f"{updater} edits models with one text encoder"
        raise UnsupportedModelError(said, value=", ".join(encoders), hint="use quickfix")


class Steering:
    """One layer of one component, whose output can be moved while the component runs.

    Args:
        backend: the model.
        site: a layer of a text encoder.
        padded: run all positions up to the model's length, as the image model reads them, not only those that count.

    Raises:
        UnsupportedModelError: the component is not a text encoder that can be run on its own.
    """

    def __init__(self, backend: Backend, site: EditSite, *, padded: bool = False) -> None:
        self._layer: Any = layer_of(backend, site)
        self._component: Any = getattr(backend.model.pipeline, site.component)
        self._backend, self._site, self._padded = backend, site, padded

    def summaries(self, prompts: Sequence[str]) -> Tensor:
        """[b, d] float32, E of each prompt."""
        with self._ready(), torch.no_grad():
            return self._run(self._tokens(prompts)).summaries

    def fact(self, request: Request, name: str) -> Fact:
        """What a request asks about one of its names.

        Raises:
            RequestError: the request has no target.
            NoOpError: name and target mean the same to the encoder already.
        """
        if request.target is None:
            raise RequestError("the request has no target yet", value=repr(request.subject))
        sources = request.render(name)
        prompts = tuple(prompt for prompt, _ in sources)
        goals = tuple(prompt for prompt, _ in request.render(request.target))
        positions = tuple(span.last for span in self._backend.spans([(text, name, at) for text, at in sources]))
        wanted, present = self.summaries(goals), self.summaries(prompts)
        if float((wanted - present).norm()) <= 1e-6 * float(present.norm()):
            raise NoOpError(
                "the edit asks the text encoder for what it already says",
                value=repr(f"{name} -> {request.target}"),
                hint="choose another target",
            )
        return Fact(name, request.target, prompts, positions, goals, wanted, present)

    def find(
        self, prompts: Sequence[str], positions: Sequence[int], goals: Tensor, others: Tensor, how: Descent
    ) -> Steered:
        """The delta that makes the prompts mean their goals and none of the others: `descend` with the contrast.

        Args:
            prompts: b prompts with the subject in them.
            positions: the subject's token in each.
            goals: [b, d], the summary that each should have.
            others: [m, d], summaries that none should have; the prompts' own are added.
            how: the search; v is the layer's output.
        """
        own = self.summaries(prompts)
        others = torch.cat([own, others.to(own)])
        rows = torch.arange(len(prompts), device=own.device)
        outputs = self._backend.capture(prompts, [self._site]).outputs[self._site]
        size = float(outputs[rows, torch.tensor(positions, device=own.device)].float().norm(dim=1).mean())

        def aim(seen: Understood) -> tuple[Tensor, float]:
            near = -(seen.summaries - goals.to(seen.summaries)).norm(dim=1, keepdim=True) / how.temperature
            far = -torch.cdist(seen.summaries[None], others[None])[0] / how.temperature
            logs = torch.log_softmax(torch.cat([near, far], 1), 1)[:, 0]
            return -logs.mean(), float(logs.detach().exp().mean())

        return self.descend(prompts, positions, aim, size, how)

    def descend(self, prompts: Sequence[str], positions: Sequence[int], aim: Aim, size: float, how: Descent) -> Steered:
        """The delta that brings the prompts nearest to an aim; see the module's text.

        Args:
            prompts: b prompts with the subject in them.
            positions: the subject's token in each.
            aim: what is minimised, given what the encoder makes of the moved prompts.
            size: |v|, in whose units decay and clamp are.
            how: the search.

        Raises:
            NonFiniteError: it left the numbers.
        """
        tokens = self._tokens(prompts)
        rows = torch.arange(len(prompts), device=tokens.device)
        at = torch.tensor(positions, device=tokens.device)
        with self._ready():
            delta = torch.zeros(self._site.d_out, device=tokens.device, requires_grad=True)
            adam = torch.optim.Adam([delta], lr=how.learning_rate)
            with torch.no_grad():
                before = aim(self._run(tokens))[1]
            steps = 0
            with torch.enable_grad():
                for _ in range(how.steps):
                    loss, near = aim(self._run(tokens, rows, at, delta))
                    if near > how.enough:
                        break
                    loss = loss + how.decay * delta.norm() / size**2
                    (delta.grad,) = torch.autograd.grad(loss, [delta])
                    adam.step()
                    with torch.no_grad():
                        delta *= min(1.0, how.clamp * size / max(float(delta.norm()), 1e-30))
                    steps += 1
            with torch.no_grad():
                after = aim(self._run(tokens, rows, at, delta))[1]
        if not bool(torch.isfinite(delta).all()):
            raise NonFiniteError(f"the search at {self._site.name} left the numbers", hint="lower the learning rate")
        return Steered(delta.detach().double(), before, after, steps)

    def _tokens(self, prompts: Sequence[str]) -> Tensor:
        return self._backend.capture(prompts, [self._site], padded=self._padded).tokens

    def _run(
        self, tokens: Tensor, rows: Tensor | None = None, at: Tensor | None = None, delta: Tensor | None = None
    ) -> Understood:
        def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if delta is None or rows is None or at is None:
                return output
            shift = torch.zeros_like(output).index_put((rows, at), delta.to(output.dtype).expand(len(rows), -1))
            return output + shift

        handle = self._layer.register_forward_hook(move)
        try:
            out = self._component(input_ids=tokens)
        finally:
            handle.remove()
        projected = getattr(out, "text_embeds", None)
        summary: Tensor = out.pooler_output if projected is None else projected
        return Understood(summary.float(), out.last_hidden_state)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Evaluation mode without autocast; every module's own mode comes back."""
        training = [module for module in self._component.modules() if module.training]
        device = self._layer.weight.device.type
        try:
            self._component.eval()
            with torch.autocast(device_type=device, enabled=False):
                yield
        finally:
            for module in training:
                module.training = True
