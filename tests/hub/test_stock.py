"""Proves the whole round in processes like a user's: huggingface_hub, diffusers and PEFT as they come, pointed at the
local Hub by their own variables. Stock loaders load the pushed repository by its name; the command line pushes and
pulls; without a network the cache answers; and with every debug switch on no byte of the token is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.conftest import TOKEN
from tests.hub.server import LocalHub
from tests.saved_model import save_tiny_model

ROOT = Path(__file__).parents[2]
REPO = "me/stock"


def run(script: str, home: Path, *args: object, **environment: str) -> dict:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *map(str, args)],
        cwd=home,
        env={**clean, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, (done.stdout + done.stderr)[-4000:]
    assert TOKEN not in done.stdout + done.stderr and TOKEN[3:20] not in done.stdout + done.stderr
    for path in home.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), f"{path.name} holds the token"
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub(server: LocalHub) -> LocalHub:
    server.make(REPO, lfs=True)  # as the real one: safetensors go to LFS
    server.make("me/public-one", private=False)
    server.fail("me/slow", "info", "stall")
    return server


@pytest.fixture(scope="module")
def online(hub: LocalHub, home: Path, tmp_path_factory) -> dict:
    base = save_tiny_model(tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("scratch"))
    return run(
        "online.py", home, base, home / "edit", REPO, home / "out",
        HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1", HF_DEBUG="1",
    )  # fmt: skip


@pytest.fixture(scope="module")
def offline(online: dict, home: Path) -> dict:
    commit = online["pushed"]["commit"]
    return run("offline.py", home, REPO, commit, home / "out-offline", HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)


def test_a_push_through_lfs_is_one_commit(online, hub, home):
    (commit,) = hub.repos[REPO].log()
    assert online["pushed"] == {"commit": commit.oid, "origin": f"{REPO}@{commit.oid}", "created": True}
    saved = {path.relative_to(home / "edit").as_posix(): path.read_bytes() for path in (home / "edit").rglob("*.*")}
    assert {key: data for key, data in commit.files.items() if key != ".gitattributes"} == saved
    assert len(hub.repos[REPO].stored) == sum(name.endswith(".safetensors") for name in saved)


def test_what_comes_back_is_the_same(online):
    assert online["pulled"] == {"origin": online["pushed"]["origin"], "same": True}


@pytest.mark.parametrize("loader", ["diffusers", "peft", "diffedit"])
def test_loaders_load_the_repository_by_its_name(online, loader):
    assert online["before"] > 1e-2  # the control
    assert online[loader] <= 1e-5


def test_the_command_line_pushes_once(online, hub):
    first, again = online["cli push"], online["cli push again"]
    assert (first["code"], first["command"], first["created"], first["private"]) == (0, "push", True, True)
    assert again["created"] is False and again["commit"] == first["commit"] == hub.repos["me/by-cli"].refs["v1"]
    assert first["origin"] == f"me/by-cli@{first['commit']}" and first["url"] == f"{hub.url}/me/by-cli"


def test_the_command_line_pulls_what_was_pushed(online, home):
    assert online["cli pull"]["code"] == 0 and online["cli pull"]["origin"] == online["cli push"]["origin"]
    for path in (home / "edit").iterdir():
        assert (home / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("command", "exit_code", "error"),
    [("cli push public", 2, "DE-707"), ("cli pull nothing", 2, "DE-702"), ("cli pull slow", 1, "DE-705")],
)
def test_errors_of_the_command_line(online, hub, command, exit_code, error):
    assert (online[command]["code"], online[command]["error"]["code"]) == (exit_code, error)
    assert online[command]["error"]["hint"] and hub.repos["me/public-one"].log() == []


def test_without_a_token_nothing_is_asked(online):
    assert "no token" in online["no token"]["message"] and online["no token"]["seconds"] < 1


def test_offline_the_cache_answers(online, offline, home):
    assert offline["by name"] == offline["by commit"] == online["pushed"]["origin"]
    assert offline["cli pull"]["code"] == 0
    for path in (home / "edit").iterdir():
        assert (home / "out-offline" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("what", ["push", "missing", "other revision"])
def test_offline_what_needs_the_hub_fails_at_once_and_says_why(offline, what):
    assert offline[what]["code"] == "DE-706" and "HF_HUB_OFFLINE" in offline[what]["message"]
    assert offline[what]["seconds"] < 1


def test_offline_the_command_line_says_so_too(offline):
    assert offline["cli push"]["code"] == 1 and offline["cli push"]["error"]["code"] == "DE-706"
