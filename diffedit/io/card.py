"""The model card: what was edited, with which numbers, how to load it, and what it does not promise.

Nothing here is computed; every number comes from the manifest. All text that a person chose (subjects, targets,
sources, settings) is escaped, and the front matter holds none of it but a checked Hub id, quoted as JSON, which YAML
reads the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from diffedit.io.files import EDIT_FILE
from diffedit.io.lora import KOHYA_FILE, PEFT_FILE, PEFT_FOLDER
from diffedit.io.manifest import Manifest
from diffedit.io.markdown import Raw, escape, table
from diffedit.io.measured import Metric
from diffedit.io.names import hub_id, is_xl
from diffedit.text import with_article

_COMPONENTS = {"unet": "UNet", "text_encoder": "text encoder"}
_XL_COMPONENTS = {"unet": "UNet", "text_encoder": "first text encoder", "text_encoder_2": "second text encoder"}
_TAGS = ("text-to-image", "stable-diffusion", "lora", "diffusers", "model-editing", "diffedit")

# Licences of well-known bases, as the Hub spells them. Another base's is named by a link to its page.
_LICENCES = {
    "builtin:emoji": "cc-by-4.0",
    "builtin:emoji-facts": "cc-by-4.0",
    **{f"CompVis/stable-diffusion-v1-{number}": "creativeml-openrail-m" for number in (1, 2, 3, 4)},
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    **{f"stabilityai/stable-diffusion-2{part}": "openrail++" for part in ("", "-base", "-1", "-1-base")},
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
_ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")

_LIMITS = """\
- Each subject is *suppressed under these prompts*, or given its new meaning there. Other words, other languages,
  learned embeddings, image prompts and further training can bring it back; methods of this kind are known to give way
  to deliberate attacks.
- This is no safety filter and no proof that a model does not know something.
- The base model and this edit together hold everything that the base model held: leaving the edit out, or subtracting
  it, undoes it.
- Concepts that share words or looks with a subject may change as well. Compare pictures of the same seeds first."""


def model_card(
    manifest: Manifest, files: Mapping[str, int], rounding: str | None = None, metrics: Sequence[Metric] = ()
) -> str:
    """The text of `README.md`.

    Args:
        manifest: of the edit.
        files: names and sizes in bytes of what lies beside the card; sections on files that are not there are left out.
        rounding: what the adapter files lost by their dtype, as a sentence of ours.
        metrics: what was measured; without any the card says that nothing was.

    Returns:
        Markdown with YAML front matter; the same input gives the same text.
    """
    title = ", ".join(f"{request.action} {escape(request.subject)}" for request in manifest.requests)
    parts = [
        _front_matter(manifest),
        f"# {title}",
        f"An edit of {_base(manifest)}, made by diffedit: a low-rank change of "
        f"{len(manifest.sites)} weight {'matrix' if len(manifest.sites) == 1 else 'matrices'}, rank at most "
        f"{max((site.rank for site in manifest.sites), default=0)}.",
        _requests(manifest),
        _method(manifest),
        _sites(manifest),
        _measured(metrics),
        "## Use",
        *_usage(manifest, files),
        *([] if rounding is None else [rounding]),
        "## Limits",
        _LIMITS,
        _licence(manifest),
        _provenance(manifest, files),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(manifest: Manifest) -> str:
    base = hub_id(manifest.base.source)
    tags = (*_TAGS[:2], "stable-diffusion-xl", *_TAGS[2:]) if _xl(manifest) else _TAGS
    lines = ["---"]
    if base is not None:
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    licence = _LICENCES.get(manifest.base.source)
    if licence is not None:
        lines.append(f"license: {licence}")
    elif base is not None:
        page = json.dumps(f"https://huggingface.co/{base}")
        lines += ["license: other", "license_name: as-the-base-model", f"license_link: {page}"]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image", "tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _base(manifest: Manifest) -> str:
    """The base model in words; a path of somebody's machine is not published."""
    base = manifest.base
    known = hub_id(base.source)
    if known is not None:
        revision = "" if base.revision is None else f" at revision {escape(base.revision)}"
        return f"[{escape(known)}](https://huggingface.co/{known}){revision}"
    if base.source.startswith("builtin:"):
        return f"the bundled model {escape(base.source)}"
    return f"a local model of the kind {escape(base.backend)}"


def _requests(manifest: Manifest) -> str:
    reasons = [*manifest.target_reasons, *[""] * len(manifest.requests)]
    rows = [
        (
            request.action,
            ", ".join(request.names),
            ""
            if request.target is None
            else request.target
            if request.kind == "style"
            else with_article(request.target),
            reason,
            ", ".join(request.preserve),
        )
        for request, reason in zip(manifest.requests, reasons, strict=False)
    ]
    prompts = sorted({template for request in manifest.requests for template in request.templates})
    return "\n\n".join(
        [
            "## What was edited",
            table(("Action", "Subject", "Becomes", "Why this target", "Asked to stay"), rows),
            "The edit was solved for these prompts, the subject in place of the braces: "
            + "; ".join(f"*{escape(prompt)}*" for prompt in prompts)
            + ".",
        ]
    )


def _method(manifest: Manifest) -> str:
    rows = [
        (kind, plugin.name, json.dumps(plugin.settings, sort_keys=True, ensure_ascii=False), _paper(plugin.reference))
        for kind, plugin in (("locator", manifest.locator), ("updater", manifest.updater))
    ]
    return "\n\n".join(
        [
            "## How",
            table(("Part", "Name", "Settings", "Reference"), rows),
            f"Tokens paired: {escape(manifest.tokens.value)}.",
        ]
    )


def _sites(manifest: Manifest) -> str:
    rows = []
    for site in manifest.sites:
        solve = site.diagnostics or {}
        numbers = [solve.get(key) for key in ("condition", "effective_rank", "residual", "preserve_drift")]
        rows.append(
            (
                site.site.name,
                site.rank,
                f"{site.relative_norm:.3g}",
                "not applied yet" if site.achieved is None else f"{site.achieved:.4f}",
                *("" if number is None else f"{number:.3g}" for number in numbers),
            )
        )
    head = ("Site", "Rank", "Change / weight", "Achieved", "Condition", "Effective rank", "Residual", "Preserve drift")
    legend = (
        "*Change / weight*: size of the change relative to the weight. *Achieved*: share of it that survived rounding "
        "to the model's dtype. *Condition* and *effective rank*: of the solve. *Residual*: share of the request that "
        "regularisation left undone. *Preserve drift*: how far the concepts that were asked to stay moved, in units of "
        "the request."
    )
    return "\n\n".join([table(head, rows), legend])


def _paper(reference: str) -> Raw:
    """The method's reference, an arXiv number in it as a link."""
    return Raw(_ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", escape(reference)))


def _measured(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return "## Measured\n\nNothing was measured on pictures when this card was written."
    rows = [
        (
            metric.name,
            "" if metric.base is None else f"{metric.base:.4g}",
            f"{metric.value:.4g}",
            "" if metric.interval is None else f"{metric.interval[0]:.4g} to {metric.interval[1]:.4g}",
            "" if metric.n is None else metric.n,
            metric.how,
        )
        for metric in metrics
    ]
    return "## Measured\n\n" + table(("What", "Unedited model", "Edited model", "95% interval", "n", "How"), rows)


def _licence(manifest: Manifest) -> str:
    """An edit is derived from its base: the base's licence applies, whatever it is."""
    licence, base = _LICENCES.get(manifest.base.source), hub_id(manifest.base.source)
    if licence is not None:
        which = f" It is {licence}."
    elif base is not None:
        which = f" It is named on [its page](https://huggingface.co/{base})."
    else:
        which = " It is not recorded here; add it before you publish this."
    return "## Licence\n\nThe licence of the base model applies to this edit and to the edited model." + which


def _usage(manifest: Manifest, files: Mapping[str, int]) -> list[str]:
    """One paragraph per program whose file is there. The slug is ASCII letters, digits and dashes: safe in code."""
    folder = manifest.slug()
    parts = []
    if EDIT_FILE in files:
        parts.append(
            "With diffedit, which checks that the base model is the right one and can revert bit by bit:\n\n"
            f'```python\nfrom diffedit import Editor\n\neditor = Editor(pipe)\neditor.load("{folder}")\n```'
        )
    components = {site.component for site in manifest.sites}
    if KOHYA_FILE in files:
        parts.append(
            "With diffusers (0.41 or later):\n\n"
            f'```python\npipe.load_lora_weights("{folder}", weight_name="{KOHYA_FILE}")\n```'
        )
        known = _XL_COMPONENTS if _xl(manifest) else _COMPONENTS
        missing = [what for component, what in known.items() if component not in components]
        edited = [what for component, what in known.items() if component in components]
        if missing and edited:
            parts[-1] += f"\n\nIt warns that the LoRA has no keys for the {' and the '.join(missing)}, which is right: "
            parts[-1] += f"only the {' and the '.join(edited)} {'is' if len(edited) == 1 else 'are'} edited."
        parts.append(
            f"In ComfyUI put `{KOHYA_FILE}` into `models/loras` and load it with both strengths at 1. In AUTOMATIC1111 "
            f"put it into `models/Lora` as `{folder}.safetensors` and add `<lora:{folder}:1>` to the prompt. The "
            "layout follows their sources; these two programs were not run."
        )
    loading = [
        f"pipe.{component} = PeftModel.from_pretrained(pipe.{component}, {where}).merge_and_unload()"
        for component, below in PEFT_FOLDER.items()
        if below + PEFT_FILE in files
        for where in [f'"{folder}"' + (f', subfolder="{below.rstrip("/")}"' if below else "")]
    ]
    if loading:
        parts.append("With PEFT:\n\n```python\nfrom peft import PeftModel\n\n" + "\n".join(loading) + "\n```")
    if parts:
        parts.insert(0, f'Below, "{folder}" stands for this folder, or for its id on the Hub ("user/name").')
    return parts


def _provenance(manifest: Manifest, files: Mapping[str, int]) -> str:
    hashes = [("Edit id", manifest.edit_id)]
    hashes += [(f"Edited {site.site.name}, SHA-256", site.result_sha256 or "") for site in manifest.sites]
    hashes += [(f"Base {name}, SHA-256", digest) for name, digest in sorted(manifest.base.fingerprints.items())]
    rows: list[tuple[object, object]] = [
        (what, Raw(f"`{_hex(digest)}`") if digest else "not applied yet") for what, digest in hashes
    ]
    rows += [(f"Version of {name}", value) for name, value in sorted(manifest.versions.items())]
    rows += [(f"File {name}", f"{size} bytes") for name, size in sorted(files.items())]
    return "\n\n".join(["## Provenance", table(("What", "Value"), rows)])


def _xl(manifest: Manifest) -> bool:
    return is_xl((site.site for site in manifest.sites), manifest.base.backend)


def _hex(digest: str) -> str:
    """Only the hexadecimal digits: what stands in a code span cannot be escaped."""
    return "".join(char for char in digest if char in "0123456789abcdef")
