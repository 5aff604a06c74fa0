"""Shared plumbing: one resumable training loop with checkpoints, loss plots, and picture grids."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

log = logging.getLogger("emoji_world")


def set_up(threads: int, seed: int) -> None:
    """Log to the console, fix the thread count and the seeds."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    np.random.seed(seed)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Save plain tensors and numbers atomically."""
    replace_file(path, lambda part: torch.save(state, part))


def load_checkpoint(path: Path) -> dict[str, object] | None:
    """Load one of our own checkpoints (tensors and numbers only), or `None`."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then cosine decay to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Averaged:
    """Exponential moving average of a model's floating-point state."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Move towards the model, faster in the first steps."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        state = model.state_dict()
        keys = list(self.values)
        torch._foreach_lerp_([self.values[k] for k in keys], [state[k] for k in keys], 1 - decay)


def plot_losses(losses: list[float], path: Path) -> None:
    """A loss curve on log axes, raw and smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(losses, alpha=0.25, linewidth=0.5)
    width = max(1, len(losses) // 60)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(np.arange(len(smooth)) + width - 1, smooth)
    axes.set(yscale="log", xlabel="step", ylabel="loss", title=path.stem)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """[-1, 1] NCHW tensor -> uint8 NHWC array."""
    return ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(pictures: torch.Tensor, path: Path, columns: int) -> None:
    """Write NCHW pictures in [-1, 1] as one PNG, row by row."""
    array = to_uint8(pictures)
    rows = math.ceil(len(array) / columns)
    side = array.shape[1]
    sheet = np.full((rows * side, columns * side, 3), 255, np.uint8)
    for index, picture in enumerate(array):
        row, column = divmod(index, columns)
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = picture
    replace_file(path, lambda part: Image.fromarray(sheet).save(part, format="PNG"))


def average_gradients(parameters: list[torch.nn.Parameter], elapsed: float) -> float:
    """With several worker processes: average the gradients (and the clock, so that all stop at the same step)."""
    if not dist.is_initialized():
        return elapsed
    flat = torch.cat([p.grad.reshape(-1) for p in parameters] + [torch.tensor([elapsed])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))
    return flat[-1].item()


def rank() -> int:
    """This worker's number; 0 without workers."""
    return dist.get_rank() if dist.is_initialized() else 0


def workers() -> int:
    """How many worker processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def run_workers(count: int, work: Path, target: Callable[..., None], *args: object) -> None:
    """Run `target` in `count` processes with one thread each: on two cores faster than one process with two threads."""
    meeting = work / "workers"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_worker, (count, str(meeting.resolve()), target, args), nprocs=count)


def _worker(number: int, count: int, meeting: str, target: Callable[..., None], args: tuple[object, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=count)
    set_up(1, number)
    target(*args)
    dist.barrier()
    dist.destroy_process_group()


def train(
    name: str,
    work: Path,
    model: torch.nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    *,
    steps: int,
    rate: float,
    warmup: int = 100,
    decay: float = 0.01,
    average: float = 0.0,
    minutes: float = math.inf,
    report: Callable[[int], None] | None = None,
    report_every: int = 500,
    save_seconds: float = 90.0,
) -> torch.nn.Module:
    """Train until `steps` or `minutes`, resuming from `<work>/<name>.pt`; at the end `model` gets the averaged weights.

    With finite `minutes` the learning rate follows the clock instead of the step count, so the decay always completes.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=decay, betas=(0.9, 0.99))
    averaged = Averaged(model, average) if average else None
    losses: list[float] = []
    start, elapsed = 0, 0.0
    path = work / f"{name}.pt"
    if saved := load_checkpoint(path):
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        start, elapsed, losses = saved["step"], saved["elapsed"], saved["losses"].tolist()
        if averaged:
            averaged.values, averaged.steps = saved["averaged"], start
        log.info("%s: resumed at step %d", name, start)
    begun = last_save = time.monotonic()

    def save(step: int) -> None:
        if rank():
            return
        state = {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step,
            "losses": torch.tensor(losses),
        }
        state["elapsed"] = elapsed + time.monotonic() - begun
        if averaged:
            state["averaged"] = averaged.values
        save_checkpoint(path, state)
        plot_losses(losses, work / f"{name}-loss.png")

    model.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10, disable=rank() > 0)
    step, spent = start, elapsed
    for step in bar:
        if spent > minutes * 60:
            break
        factor = warmup_cosine(step, steps, warmup)
        if math.isfinite(minutes):
            factor = min(factor, warmup_cosine(warmup + int(1e6 * spent / (minutes * 60)), warmup + 1_000_000, warmup))
        for group in optimiser.param_groups:
            group["lr"] = rate * min(factor, (step + 1) / warmup)
        loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        spent = average_gradients(trained, elapsed + time.monotonic() - begun)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if averaged:
            averaged.update(model)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
        if time.monotonic() - last_save > save_seconds:
            save(step + 1)
            last_save = time.monotonic()
        if report and (step + 1) % report_every == 0 and not rank():
            report(step + 1)
            model.train()
    save(step + 1)
    if averaged:
        model.load_state_dict({**model.state_dict(), **averaged.values})
    return model.eval()
