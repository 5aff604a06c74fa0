"""Where does the bundled model keep what it knows, what does it cost to find out, and does it tell where to edit?

Four questions, each a step with a JSON file of its own; a step whose file is there is not run again, and traces go on
where they were interrupted:

* `speed`: the same image trace by the plain loop (one whole generation per state, as stock pipelines do it) and by
  diffedit, in one process; seconds, ratio, the largest difference of the two tables, peak memory.
* `measures`: rank correlation of the cheap measures with the score of pictures, over the states of the text encoder.
* `paper`: is there one causal state in the text encoder, and is it self-attention 0 at the last subject token? Is the
  knowledge of the UNet spread out? For objects, styles and colours.
* `editing`: QuickFix at each site of the text encoder, one at a time: does the traced effect of a site tell how well an
  edit there works, and what it does to other objects?

    python -m benchmarks.tracing --out docs/results/tracing
    python -m benchmarks.tracing --out sample --sample      # minutes: the same on a few prompts
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.logging import RichHandler
from scipy.stats import spearmanr

from diffedit import CausalTrace, CausalTracing, Editor, FixedLocator, TokenRule
from diffedit.cli.shell import to_json
from diffedit.errors import DiffEditError
from diffedit.evaluate.scorer import Scorer
from diffedit.io.folder import write_file
from diffedit.locators.noise import subject_noise
from diffedit.text import with_article
from diffedit.tracing.probes import NAMES, load_probes
from diffedit.tracing.run import trace

logger = logging.getLogger("benchmarks.tracing")
FIRST_SEED = 700_000
TOKENS = ("last_subject", "all_subject", "eos")
SUBJECTS = ("dog", "rabbit", "whale", "tractor")
JUDGE = "builtin:emoji-scorer"


def plain_image_trace(editor: Editor, scorer: Scorer, prompt: str, subject: str, seed: int) -> dict[str, Any]:
    """One full generation per state through the stock pipeline; uses nothing of diffedit's tracing but the noise."""
    pipeline, own = editor.pipeline, editor.backend.model.sampling
    encoder = pipeline.text_encoder
    root = getattr(encoder, "text_model", encoder)
    span = editor.backend.span(prompt, subject)
    table = root.embeddings.token_embedding.weight.detach()
    noise = subject_noise(span, table.shape[1], 3 * float(table.std()), seed)
    parts = [(kind, i) for i in range(len(root.encoder.layers)) for kind in ("self_attn", "mlp")]
    modules = {part: getattr(root.encoder.layers[part[1]], part[0]) for part in parts}
    clean: dict[Any, torch.Tensor] = {}

    def first(out: Any) -> torch.Tensor:
        return out[0] if isinstance(out, tuple) else out

    def draw(corrupt: bool, state: Any = None, where: tuple[int, ...] = (), keep: bool = False) -> float:
        handles = []

        def on_part(part: Any) -> Any:
            def hook(module: Any, args: Any, out: Any) -> Any:
                if keep:
                    clean[part] = first(out).clone()
                if part != state:
                    return out
                changed = first(out).clone()
                changed[:, list(where)] = clean[part][:, list(where)]
                return (changed, *out[1:]) if isinstance(out, tuple) else changed

            return hook

        def on_embedding(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            changed = out.clone()
            changed[:, span.start : span.stop] += noise
            return changed

        handles += [module.register_forward_hook(on_part(part)) for part, module in modules.items()]
        if corrupt:
            handles.append(root.embeddings.register_forward_hook(on_embedding))
        with torch.no_grad():
            embedding = encoder(input_ids=editor.backend.tokenize([prompt], padded=True)).last_hidden_state
        for handle in handles:
            handle.remove()
        image = pipeline(
            prompt_embeds=embedding,
            negative_prompt="",
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=own.steps,
            guidance_scale=own.guidance,
            height=own.pixels,
            width=own.pixels,
        ).images[0]
        return float(scorer.scores([image], [prompt])[0, 0])

    scores = {"clean": draw(False, keep=True), "corrupted": draw(True)}
    places = [span.positions(TokenRule(rule)) for rule in TOKENS]
    return {**scores, "restored": [[draw(True, part, place) for place in places] for part in parts]}


def speed(editor: Editor, folder: Path, sample: bool) -> dict[str, Any]:
    """Both ways on the same prompts, seeds and states."""
    scorer = Scorer.load(JUDGE)
    probes = [("a picture of a dog", "dog"), ("a picture of a hot dog on a blue background", "hot dog")][: 2 - sample]
    locator = CausalTracing(measure="image", seeds=1, tokens=TOKENS)
    fast_tracer = locator.tracer(editor.backend, probes, seed=FIRST_SEED)
    warm = CausalTracing(measure="image", measure_settings={"steps": 1}, seeds=1, kinds=("mlp",), tokens=("eos",))
    warm.tracer(editor.backend, probes[:1]).all()
    rows = []
    for unit in fast_tracer.units:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        plain = plain_image_trace(editor, scorer, unit.prompt, unit.subject, unit.seed)
        middle = time.perf_counter()
        between = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fast = fast_tracer.run(unit)
        end = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        effect = [np.array(found["restored"], dtype=float) - found["corrupted"] for found in (plain, fast)]
        rows.append(
            {
                "prompt": unit.prompt,
                "states": int(effect[0].size),
                "plain_seconds": middle - start,
                "seconds": end - middle,
                "ratio": (middle - start) / (end - middle),
                "largest_difference": float(np.abs(effect[0] - effect[1]).max()),
                "peak_mb": {"before": before / 1024, "plain": between / 1024, "diffedit": peak / 1024},
            }
        )
        logger.info("%s: ratio %.2f, difference %.1e", unit.prompt, rows[-1]["ratio"], rows[-1]["largest_difference"])
    cheap = CausalTracing(measure="denoising", seeds=1, tokens=TOKENS).tracer(editor.backend, probes, seed=FIRST_SEED)
    start = time.perf_counter()
    cheap.run(cheap.units[0])
    denoising = time.perf_counter() - start
    return {"units": rows, "batch_size": fast_tracer.batch_size, "denoising_seconds": denoising}


def traced(editor: Editor, folder: Path, name: str, probes: Any, seeds: int, **settings: Any) -> CausalTrace:
    """A trace in its own folder: loaded if it is there, else run or taken up."""
    where = folder / "traces" / name
    if (where / "trace.json").exists():
        return CausalTrace.load(where)
    logger.info("tracing %s", name)
    locator = CausalTracing(seeds=seeds, **settings)
    found = trace(editor.backend, locator, probes, seed=FIRST_SEED, out=where)
    found.plot(where / "heatmap.png")
    return found


def measures(editor: Editor, folder: Path, sample: bool) -> dict[str, Any]:
    """Spearman's rho of each cheap measure with the image score, per attribute, over the states."""
    result: dict[str, Any] = {}
    for name in NAMES[: 1 if sample else None]:
        found = {kind: text_trace(editor, folder, name, kind, sample) for kind in ("image", "denoising", "embedding")}
        image = found["image"].scores().ravel()
        result[name] = {
            kind: {"rho": float(spearmanr(found[kind].scores().ravel(), image).statistic), "states": image.size}
            for kind in ("denoising", "embedding")
        }
    return result


def text_trace(editor: Editor, folder: Path, name: str, measure: str, sample: bool) -> CausalTrace:
    """The text encoder's trace of one attribute by one measure."""
    probes = load_probes(name)[: 2 if sample else None]
    settings = {"measure": measure, "tokens": (*TOKENS, "padding")}
    return traced(editor, folder, f"text-{name}-{measure}", probes, 1 if sample else 3, **settings)


def describe(found: CausalTrace) -> dict[str, Any]:
    """What is causal in a trace, strongest first."""
    ranked = sorted((state for state in found.states if state.effect.n), key=lambda state: -state.effect.mean)
    total = found.total_effect
    out: dict[str, Any] = {"total_effect": [total.mean, total.low, total.high], "runs": total.n}
    out["states"] = len(ranked)
    out["causal"] = sum(state.causal for state in ranked)
    out["at_least_half"] = sum(state.causal and state.share >= 0.5 for state in ranked)
    out["at_least_tenth"] = sum(state.causal and state.share >= 0.1 for state in ranked)
    out["strongest"] = [
        [state.part.name, state.column, state.effect.mean, state.effect.low, state.effect.high, state.share]
        for state in ranked[:12]
    ]
    try:
        best = found.best()
        out["best"] = [best.sites[0].name, best.tokens.value]
    except DiffEditError as error:
        out["best"] = str(error)
    return out


def paper(editor: Editor, folder: Path, sample: bool) -> dict[str, Any]:
    """Text encoder and UNet, by pictures, for each attribute."""
    result: dict[str, Any] = {}
    for name in NAMES[: 1 if sample else None]:
        result[name] = {"text_encoder": describe(text_trace(editor, folder, name, "image", sample))}
        probes = load_probes(name)[: 2 if sample else None]
        for measure in ("image", "denoising"):
            settings = {"component": "unet", "measure": measure}
            found = traced(editor, folder, f"unet-{name}-{measure}", probes, 1 if sample else 2, **settings)
            result[name][f"unet_{measure}"] = describe(found)
    return result


def editing(editor: Editor, folder: Path, sample: bool) -> dict[str, Any]:
    """Efficacy and specificity of QuickFix at each site beside the site's traced effect at the last subject token."""
    scorer = Scorer.load(JUDGE)
    objects = list(editor.vocabulary.objects)
    subjects = [name for name in SUBJECTS if name in objects][: 1 if sample else None]
    images, per_other = (4, 1) if sample else (24, 1)
    others = [name for name in objects if name not in subjects][: 4 if sample else 30]
    cases = folder / "editing"
    cases.mkdir(parents=True, exist_ok=True)
    paths = [cases / f"{subject.replace(' ', '-')}.json" for subject in subjects]
    for subject, path in zip(subjects, paths, strict=True):
        if not path.exists():
            write_file(path, json.dumps(_edit_subject(editor, scorer, subject, others, images, per_other)).encode())
    rows = [
        row for subject in subjects for row in json.loads((cases / f"{subject.replace(' ', '-')}.json").read_text())
    ]
    traces = {kind: text_trace(editor, folder, "object", kind, sample) for kind in ("image", "denoising")}
    effects = {
        kind: {state.part.sites[0].name: state.effect.mean for state in found.states if state.column == "last_subject"}
        for kind, found in traces.items()
    }
    sites = []
    for site in dict.fromkeys(row["site"] for row in rows):
        mine = [row for row in rows if row["site"] == site]
        totals = {key: sum(row[key] for row in mine) for key in ("before", "left", "others_before", "others_after")}
        efficacy = 1 - totals["left"] / max(1, totals["before"])
        specificity = totals["others_after"] / max(1, totals["others_before"])
        norm = float(np.mean([row["relative_norm"] for row in mine]))
        record = {"site": site, "efficacy": efficacy, "specificity": specificity, "relative_norm": norm, **totals}
        sites.append({**record, **{f"effect_{kind}": effects[kind][site] for kind in effects}})
    plot_editing(sites, folder / "editing.png")
    ranks = {
        kind: {
            key: float(spearmanr([site[f"effect_{kind}"] for site in sites], values).statistic)
            for key, values in (
                ("efficacy", [site["efficacy"] for site in sites]),
                ("specificity", [site["specificity"] for site in sites]),
                ("relative_norm", [site["relative_norm"] for site in sites]),
            )
        }
        for kind in effects
    }
    return {"sites": sites, "spearman": ranks, "subjects": subjects, "images": images, "others": len(others)}


def plot_editing(sites: list[dict[str, Any]], path: Path) -> None:
    """Efficacy, specificity and size of the change against the traced effect, one point per site."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    panels: Any = figure.subplots(1, 3)
    keys = ("efficacy", "specificity", "relative_norm")
    for panel, key in zip(panels, keys, strict=True):
        for site in sites:
            attention = "self_attn" in site["site"]
            x, y, layer = site["effect_image"], site[key], site["site"].split("layers.")[1].split(".")[0]
            panel.plot(x, y, "o" if attention else "s", mfc="black" if attention else "white", mec="black", ms=5)
            panel.annotate(layer, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        panel.set_xlabel("traced effect at the last subject token", fontsize=8)
        panel.set_title(key.replace("_", " "), fontsize=9)
        panel.tick_params(labelsize=7)
        panel.set_ylim(*((0, None) if key == "relative_norm" else (0.5, 1.03)))
    figure.suptitle("QuickFix at each site of the text encoder (dots: self-attention, squares: MLP)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _edit_subject(
    editor: Editor, scorer: Scorer, subject: str, others: list[str], images: int, per_other: int
) -> list[dict[str, Any]]:
    objects = editor.vocabulary.objects
    contexts = ("{}", "a picture of {}", "an icon of {}")
    jobs = [(contexts[i % 3].format(with_article(subject)), FIRST_SEED + 1000 + i) for i in range(images)]
    rest = [(f"a picture of {with_article(name)}", FIRST_SEED + 2000 + i) for name in others for i in range(per_other)]
    names = [name for name in others for _ in range(per_other)]

    def count() -> tuple[int, int]:
        seen = scorer.name_objects(editor.generate_pairs([*jobs, *rest], batch_size=50), objects)
        hits = sum(name == subject for name in seen[:images])
        return hits, sum(a == b for a, b in zip(seen[images:], names, strict=True))

    before, others_before = count()
    rows = []
    for site in editor.backend.sites():
        base = {"subject": subject, "site": site.name, "before": before, "others_before": others_before}
        try:
            edit = editor.ablate(subject, locator=FixedLocator(layer=site.layer, role=site.role))
            left, others_after = count()
            norm = edit.manifest.sites[0].relative_norm
            rows.append({**base, "left": left, "others_after": others_after, "relative_norm": norm, "refused": None})
        except DiffEditError as error:  # a site where the solve finds nothing to write leaves the model as it is
            rows.append(
                {**base, "left": before, "others_after": others_before, "relative_norm": 0.0, "refused": str(error)}
            )
        editor.revert()
        logger.info("%s at %s: left %d of %d", subject, site.path, rows[-1]["left"], images)
    return rows


STEPS: dict[str, Callable[[Editor, Path, bool], dict[str, Any]]] = {
    "speed": speed,
    "measures": measures,
    "paper": paper,
    "editing": editing,
}


def main() -> None:
    """Run the steps that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/tracing"))
    parser.add_argument("--steps", nargs="*", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--sample", action="store_true", help="a few prompts only, to try it out")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, handlers=[RichHandler()], format="%(message)s")
    editor = Editor("builtin:emoji")
    editor.pipeline.set_progress_bar_config(disable=True)
    for name in args.steps:
        path = args.out / f"{name}.json"
        if path.exists():
            continue
        logger.info("step %s", name)
        start = time.perf_counter()
        result = STEPS[name](editor, args.out, args.sample)
        document = {"step": name, "sample": args.sample, "threads": torch.get_num_threads(), **{"result": result}}
        document["seconds"] = round(time.perf_counter() - start, 1)
        args.out.mkdir(parents=True, exist_ok=True)
        write_file(path, (to_json(document) + "\n").encode(), overwrite=True)


if __name__ == "__main__":
    main()
