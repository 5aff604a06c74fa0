"""`diffedit generate`: pictures from a model, with or without edits, in one process or in several."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffedit.cli import options
from diffedit.cli.describe import print_rows
from diffedit.cli.editing import loading_fields, open_editor, process_device, save_image
from diffedit.cli.shell import Result, working
from diffedit.errors import OutputExistsError


def generate(
    model: options.Model,
    prompt: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)],
    edit: options.EditFolders = None,
    seed: options.Seeds = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Folder for the pictures.")] = Path(
        "pictures"
    ),
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Pictures drawn together; costs memory, saves time.")
    ] = 4,
    overwrite: options.Overwrite = False,
    backend: options.BackendName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    variant: options.Variant = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Draw every prompt with every seed; with --edit, from the edited model.

    accelerate launch -m diffedit generate ... spreads the pictures over processes; they are the same for any number.

    Example: diffedit generate builtin:emoji "a dog" "a cat" --edit no-dog --seed 0 --seed 1
    """
    seeds = list(dict.fromkeys(seed or [0]))
    paths = picture_paths(out, prompt, seeds)
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise OutputExistsError(
            "a picture of that name is already there",
            value=str(existing[0]),
            hint="choose another folder or add --overwrite",
        )
    editor = open_editor(model, loading_fields(backend, process_device(device), dtype, variant))
    with working(f"Loading {len(edit or ())} edits"):
        loaded = [editor.load(folder).id for folder in edit or ()]
    pairs = [(text, number) for text in prompt for number in seeds]
    with working(f"Drawing {len(paths)} pictures"):
        from diffedit.drawing import draw
        from diffedit.tracing.run import first_process

        draw(
            editor,
            pairs,
            lambda index, image: save_image(image, paths[index]),
            steps=steps,
            guidance=guidance,
            batch_size=batch_size,
        )
    if not first_process():
        raise typer.Exit(0)
    pictures = [
        {"prompt": text, "seed": number, "file": str(path)} for (text, number), path in zip(pairs, paths, strict=True)
    ]

    def render(console: Console) -> None:
        print_rows(
            console,
            [(f"{text!r}, seed {number}", str(path)) for (text, number), path in zip(pairs, paths, strict=True)],
        )

    return Result({"command": "generate", "model": model, "edits": loaded, "pictures": pictures}, render)


def picture_paths(folder: Path, prompts: list[str], seeds: list[int]) -> list[Path]:
    """One file name per (prompt, seed), prompt by prompt: a running number, the prompt in plain letters, the seed.

    >>> [str(path) for path in picture_paths(Path("out"), ["A dog!"], [0, 7])]
    ['out/00-a-dog-seed0.png', 'out/00-a-dog-seed7.png']
    """
    names = []
    for number, prompt in enumerate(prompts):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "prompt"
        names += [folder / f"{number:02d}-{slug}-seed{seed}.png" for seed in seeds]
    return names
