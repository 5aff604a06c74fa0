"""A third party's package brings a backend, a locator and an updater: installed like any other, found by name, used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
USE_IT = """
from diffedit import Editor, registry
from diffedit.request import make_request
from diffedit.testing import check_backend, check_locator, check_updater
from diffedit_words import WordsPipeline

editor = Editor(WordsPipeline())
assert editor.backend.name == "words", editor.backend

requests = [make_request(subject="dog", target="cat", templates=("{}", "a {}"))]
check_backend(editor.backend, "a big dog runs", "dog")
check_locator(registry.build("locators", "words-last"), editor.backend, requests)
check_updater(registry.build("updaters", "words-strength"), editor.backend, requests)

before = editor.pipeline.layers[1].weight.clone()
dog, cat, pig = (image.getpixel((0, 0)) for image in editor.generate(["a dog", "a cat", "a pig"]))
edit = editor.ablate("dog", target="cat", locator="words-last", updater="words-strength", templates=("a {}",))
assert edit.delta.sites[0].layer == 1
edit.save("edit")
edit.revert()
assert (editor.pipeline.layers[1].weight == before).all()

other = Editor(WordsPipeline())
loaded = other.load("edit")
assert loaded.manifest.updater.name == "words-strength" and loaded.manifest.base.backend == "words"
new_dog, new_cat, new_pig = (image.getpixel((0, 0)) for image in other.generate(["a dog", "a cat", "a pig"]))
assert new_dog != dog, "the edit shows"
other.save_pipeline("merged")
print("used")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The plugin installed by pip, without any network, into a folder that subprocesses have on their path."""
    source = shutil.copytree(HERE / "plugin_package", tmp_path_factory.mktemp("source") / "plugin")
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", site, source], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(site), str(HERE.parent)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(environment: dict[str, str], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, env=environment, cwd=folder
    )


def test_the_plugin_is_listed(environment, tmp_path):
    done = run(environment, tmp_path, "-m", "diffedit", "list", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    records = {record["name"]: record for kind in ("backends", "locators", "updaters") for record in found[kind]}
    assert {"words", "words-last", "words-strength"} <= records.keys()
    assert not any(records[name]["built_in"] for name in ("words", "words-last", "words-strength"))
    assert records["words-strength"]["settings"] == [
        {
            "name": "strength",
            "type": "float",
            "default": 1.0,
            "description": "share of the change that is kept; below 1 the subject is only weakened.",
        }
    ]
    assert records["broken"]["error"], "a broken plugin is listed with its error and hides nothing"


def test_the_plugin_is_used(environment, tmp_path):
    done = run(environment, tmp_path, "-c", USE_IT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "used"


def test_a_broken_plugin_is_an_error_only_for_those_who_ask_for_it(environment, tmp_path):
    ask = "from diffedit import registry, DiffEditError\ntry: registry.get('updaters', 'broken')\n"
    done = run(environment, tmp_path, "-c", ask + "except DiffEditError as e: print(e.code)")
    assert done.stdout.strip() == "DE-200", done.stderr
