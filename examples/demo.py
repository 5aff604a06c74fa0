"""What `make demo` runs: three edits of the bundled model, with pictures from before and after.

An object is ablated with an automatic target, a style is ablated, and an object is given another meaning. Each edit is
saved to a folder of its own under demo/, with a before/after picture in it.

    python examples/demo.py [--out FOLDER] [--seeds N]
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import time
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
warnings.simplefilter("ignore")

from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402

from diffedit import Edit, Editor  # noqa: E402
from diffedit.cli.editing import PREVIEW_NAME, draw_preview  # noqa: E402

MODEL = "builtin:emoji"
OBJECT = "dog"
STYLE = "stencil"
UPDATE = ("house", "castle")

console = Console(highlight=False)


def show(editor: Editor, edit: Edit, folder: Path, seeds: range, seconds: float) -> None:
    """Save an applied edit with its picture, say what it is, and take it out of the model again."""
    saved = edit.save(folder)
    draw_preview(editor, edit, list(seeds)).save(saved / PREVIEW_NAME)
    edit.revert()
    sizes = {file.name: file.stat().st_size / 1024 for file in saved.iterdir() if file.name != PREVIEW_NAME}
    pairs = sizes.pop("pairs.safetensors", 0)
    console.print(f"\n[bold]{escape(edit.summary())}[/]")
    lora = sizes["pytorch_lora_weights.safetensors"]
    console.print(f"  solved in {1000 * seconds:.0f} ms, saved in [cyan]{folder}[/]")
    console.print(
        f"  the LoRA alone {lora:.0f} KB, with the edit's record, PEFT files and card {sum(sizes.values()):.0f} KB"
        f" (and {pairs:.0f} KB that are only needed to compose it with others)"
    )
    console.print(f"  picture: [cyan]{folder / PREVIEW_NAME}[/]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where to write (default: demo)")
    parser.add_argument("--seeds", type=int, default=4, help="pictures per prompt (default: 4)")
    options = parser.parse_args()
    logging.getLogger("diffedit").setLevel(logging.WARNING)
    out, seeds = options.out, range(options.seeds)
    for name in ("object", "style", "update"):
        shutil.rmtree(out / name, ignore_errors=True)

    start = time.perf_counter()
    with console.status(f"Opening {MODEL} ..."):
        editor = Editor(MODEL)
    known = editor.vocabulary
    console.print(f"[bold]{MODEL}[/]: {len(known.objects)} objects, {len(known.styles)} styles")

    for name, run in (
        ("object", lambda: editor.ablate(OBJECT)),
        ("style", lambda: editor.ablate(STYLE, kind="style")),
        ("update", lambda: editor.update(*UPDATE)),
    ):
        with console.status(f"Editing and drawing the {name} ..."):
            begin = time.perf_counter()
            edit = run()
            seconds = time.perf_counter() - begin
            show(editor, edit, out / name, seeds, seconds)

    console.print(f"\nDone in {time.perf_counter() - start:.0f} s. Look at the pictures in [cyan]{out}/*/[/].")
    console.print("The same edit in stock libraries, without diffedit:")
    console.print(f'  pipe.load_lora_weights("{out / "object"}")', style="green")
    console.print(f'  PeftModel.from_pretrained(pipe.text_encoder, "{out / "object"}")', style="green")


if __name__ == "__main__":
    main()
