"""The same edit gives the same bytes: a thousand times, in other processes, with other hash seeds, in any order."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from diffedit.delta import Delta
from diffedit.edit import Edit
from diffedit.io.files import EDIT_FILE, delta_to_tensors, encode_edit
from tests.reliability.reader import edits as small_edits
from tests.reliability.samples import edits

ROOT = Path(__file__).parents[2]
SAVES = 1000
SEEDS = ("0", "1", "77", "4294967295")
PROGRAM = """
import hashlib, json, logging, sys
logging.disable(logging.WARNING)
from diffedit import Edit
print(json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in Edit.load(sys.argv[1]).files().items()}))
"""


def test_a_thousand_saves(tmp_path: Path) -> None:
    (edit,) = edits(1)
    files = edit.files()
    tensors = delta_to_tensors(edit.delta)
    seen = set()
    for i in range(SAVES):
        order = sorted(tensors, reverse=bool(i % 2))
        seen.add(encode_edit(edit.manifest, {name: tensors[name].clone() for name in order}))
    assert seen == {files[EDIT_FILE]}
    for i in range(20):
        path = edit.save(tmp_path / str(i % 2), overwrite=True)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == files


def test_saving_what_was_loaded_gives_the_same_folder(tmp_path: Path) -> None:
    for edit in edits(3):
        path = edit.save(tmp_path / edit.id)
        assert Edit.load(path).files() == edit.files()


def test_the_order_of_sites_does_not_matter() -> None:
    made = small_edits()[1]
    turned = Delta(dict(reversed(made.delta.factors.items())))
    assert Edit(made.manifest, turned).files() == Edit(made.manifest, made.delta).files()


def test_other_processes_and_hash_seeds(tmp_path: Path) -> None:
    """Python's hash seed decides the order of sets: a set that leaks into a file would show."""
    (edit,) = edits(1)
    path = edit.save(tmp_path / "edit")
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in edit.files().items()}
    running = []
    for seed in SEEDS:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, str(path)]
        running.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and json.loads(output) == expected
