"""Which output of one layer would make the subject's prompt mean the target: found by gradients, on no weight.

The layer's output at the subject's token is moved by one vector delta, the same in all prompts of the subject, and the
text encoder runs on from there. Its summary of the prompt, E (the end-of-text state, projected where the encoder has a
projection), is compared with the frozen summaries of the target g_i and of everything it must not become:

    p_i = softmax(-|E_i - g_i| / tau, -|E_i - n_1| / tau, ...)[0],        loss = -mean_i log p_i + decay |delta| / |v|^2

with v the layer's present output, |.| the Euclidean norm, the subject's own meaning always among the n_j, and
|delta| <= clamp |v|. Adam; stops once the mean of p_i passes `enough`.

Source: Arad et al. 2024 (ReFACT, arXiv 2306.00738), text contrast with the l2 distance. Differs: encoders without a
projection (Stable Diffusion 1.x and 2.x ship none) are read at the unprojected end-of-text state; tau is a setting;
with several prompts of the subject each has its own target prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffedit.errors import NonFiniteError, UnsupportedModelError
from diffedit.interfaces import Backend
from diffedit.site import EditSite


@dataclass(frozen=True)
class Descent:
    """How delta is looked for; see the module's text.

    Attributes:
        steps: at most so many.
        learning_rate: of Adam.
        decay: larger keeps delta small.
        clamp: largest |delta| in units of |v|.
        temperature: tau.
        enough: mean probability of the target at which to stop.
    """

    steps: int
    learning_rate: float
    decay: float
    clamp: float
    temperature: float
    enough: float


@dataclass(frozen=True, eq=False)
class Steered:
    """What was found.

    Attributes:
        delta: [d_out], float64.
        before: mean probability of the target without it.
        after: with it.
        steps: taken.
    """

    delta: Tensor
    before: float
    after: float
    steps: int


class Steering:
    """One layer of one component, whose output can be moved while the component runs.

    Args:
        backend: the model.
        site: a layer of a text encoder.

    Raises:
        UnsupportedModelError: the component is not a text encoder that can be run on its own.
    """

    def __init__(self, backend: Backend, site: EditSite) -> None:
        component: Any = getattr(backend.model.pipeline, site.component, None)
        weight = backend.weight(site)
        owners = [m for m in component.modules() if getattr(m, "weight", None) is weight] if component else []
        if len(owners) != 1:
            cause = "no single module of the pipeline holds its weight"
            raise UnsupportedModelError("the layer cannot be steered", value=site.name, cause=cause)
        self._component, self._layer, self._backend, self._site = component, owners[0], backend, site

    def summaries(self, prompts: Sequence[str]) -> Tensor:
        """[b, d] float32, E of each prompt."""
        with self._ready(), torch.no_grad():
            return self._run(self._tokens(prompts))

    def find(
        self, prompts: Sequence[str], positions: Sequence[int], goals: Tensor, others: Tensor, how: Descent
    ) -> Steered:
        """The delta that makes the prompts mean their goals.

        Args:
            prompts: b prompts with the subject in them.
            positions: the subject's token in each.
            goals: [b, d], the summary that each should have.
            others: [m, d], summaries that none should have; the prompts' own are added.
            how: the search.
        """
        tokens = self._tokens(prompts)
        rows = torch.arange(len(prompts), device=tokens.device)
        at = torch.tensor(positions, device=tokens.device)
        with self._ready():
            with torch.no_grad():
                own, outputs = self._run(tokens), self._backend.capture(prompts, [self._site]).outputs[self._site]
            size = float(outputs[rows, at].float().norm(dim=1).mean())
            others = torch.cat([own, others.to(own)])
            delta = torch.zeros(self._site.d_out, device=own.device, requires_grad=True)
            adam = torch.optim.Adam([delta], lr=how.learning_rate)

            def chance() -> Tensor:
                found = self._run(tokens, rows, at, delta)
                near = -(found - goals.to(found)).norm(dim=1, keepdim=True) / how.temperature
                far = -torch.cdist(found[None], others[None])[0] / how.temperature
                return torch.log_softmax(torch.cat([near, far], 1), 1)[:, 0]

            with torch.no_grad():
                before = float(chance().exp().mean())
            steps = 0
            with torch.enable_grad():
                for _ in range(how.steps):
                    logs = chance()
                    if float(logs.detach().exp().mean()) > how.enough:
                        break
                    loss = -logs.mean() + how.decay * delta.norm() / size**2
                    (delta.grad,) = torch.autograd.grad(loss, [delta])
                    adam.step()
                    with torch.no_grad():
                        delta *= min(1.0, how.clamp * size / max(float(delta.norm()), 1e-30))
                    steps += 1
            with torch.no_grad():
                after = float(chance().exp().mean())
        if not bool(torch.isfinite(delta).all()):
            raise NonFiniteError(f"the search at {self._site.name} left the numbers", hint="lower the learning rate")
        return Steered(delta.detach().double(), before, after, steps)

    def _tokens(self, prompts: Sequence[str]) -> Tensor:
        return self._backend.capture(prompts, [self._site]).tokens

    def _run(
        self, tokens: Tensor, rows: Tensor | None = None, at: Tensor | None = None, delta: Tensor | None = None
    ) -> Tensor:
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
        return summary.float()

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
