"""Pictures to files, spread over the processes that accelerate started.

The pairs (prompt, seed) are cut into batches first, and whole batches go to processes: number i to process i modulo
their number. A picture depends a little, in its last bits, on what it is drawn together with; so the batches must not
depend on how many processes there are, and then any number of them gives the same pictures.

Each process writes its own pictures, batch by batch. Nobody starts before everybody has looked at what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffedit.editor import Editor
from diffedit.tracing.run import team

BATCH = 4


def draw(
    editor: Editor,
    pairs: Sequence[tuple[str, int]],
    keep: Callable[[int, Any], None],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = BATCH,
    shared: bool = True,
) -> int:
    """Draw this process's share; returns when every process is done.

    Args:
        editor: the model.
        pairs: (prompt, seed), the same list in every process.
        keep: called with the pair's index and its picture.
        steps: see `Editor.generate`.
        guidance: see `Editor.generate`.
        batch_size: pictures drawn together. It may change their last bits; the number of processes does not.
        shared: whether every process sees what the others keep; if not, each draws everything.

    Returns:
        How many pictures this process drew.
    """
    batches = [range(i, min(i + batch_size, len(pairs))) for i in range(0, len(pairs), batch_size)]
    state = team() if shared else None
    if state is not None:
        state.wait_for_everyone()
        batches = batches[state.process_index :: state.num_processes]
    for batch in batches:
        chosen = [pairs[i] for i in batch]
        images = editor.generate_pairs(chosen, steps=steps, guidance=guidance, batch_size=batch_size)
        for i, image in zip(batch, images, strict=True):
            keep(i, image)
    if state is not None:
        state.wait_for_everyone()
    return sum(len(batch) for batch in batches)


@contextmanager
def first_before_others() -> Iterator[None]:
    """The block in the first process, and then in the others: what it keeps in files they need not make again."""
    state = team()
    if state is None:
        yield
    else:
        with state.main_process_first():
            yield
