"""One local Hub for all tests here, an edit to send, and a watch over everything that is printed or logged."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffedit import Edit, Editor
from diffedit.io import hub, hub_push
from diffedit.io.hub_calls import Patience
from tests.hub.server import LocalHub
from tests.tiny import build

TOKEN = "hf_CanaryCanaryCanary0123456789ab"
LIBRARIES = ("huggingface_hub", "diffedit", "httpx", "httpx2", "httpcore", "httpcore2")


@pytest.fixture(scope="session")
def server() -> Iterator[LocalHub]:
    """Kept until the end: calls that a test gave up may still be waiting for it."""
    with LocalHub(TOKEN).running() as running:
        yield running
        logging.getLogger("huggingface_hub").setLevel(
            logging.CRITICAL
        )  # of those that still wait, nobody wants to hear


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A repository of this test's own."""
    return "me/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:90]


@pytest.fixture(scope="session")
def made(tokenizer_folder: Path) -> Edit:
    return Editor(build.pipeline(tokenizer_folder)).ablate("dog", target="cat", preserve=["pig"])


@pytest.fixture
def edit(made: Edit) -> Edit:
    """A real edit, bound to no model."""
    return Edit(made.manifest, made.delta)


@pytest.fixture(autouse=True)
def nothing_secret_comes_out(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """Whatever a test does: no byte of the token on stdout, on stderr or in any log, at the lowest level."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    loggers = [logging.getLogger(library) for library in LIBRARIES]
    before = [(logger, logger.level) for logger in loggers]
    caplog.set_level(logging.DEBUG)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(caplog.handler)
    yield
    for logger, level in before:
        logger.setLevel(level)
        logger.removeHandler(caplog.handler)
    printed = capfd.readouterr()
    for text in (printed.out, printed.err, caplog.text, *(str(vars(record)) for record in caplog.records)):
        assert TOKEN not in text and TOKEN[3:20] not in text


Push = Callable[..., hub_push.Pushed]


@pytest.fixture
def push(server: LocalHub, name: str, edit: Edit) -> Push:
    """`Edit.push_to_hub`, to the local Hub and in a hurry."""

    def run(deadline: float = 20.0, pause: float = 0.02, files: dict[str, bytes] | None = None, **options):
        options = {"title": "test edit (0123)", "token": TOKEN, "endpoint": server.url, **options}
        return hub_push.push(files or edit.files(), name, patience=Patience(deadline, pause=pause), **options)

    return run


@pytest.fixture
def pull(server: LocalHub, name: str, tmp_path: Path) -> Callable[..., hub.Pulled]:
    """`Edit.from_pretrained` up to the reading, from the local Hub and in a hurry."""

    def run(deadline: float = 20.0, pause: float = 0.02, repo: str = name, **options):
        options = {"token": TOKEN, "endpoint": server.url, "cache_dir": tmp_path / "cache", **options}
        return hub.pull(repo, patience=Patience(deadline, pause=pause), **options)

    return run


@pytest.fixture
def repo(server: LocalHub, name: str, edit: Edit):
    """The test's repository with the edit in it."""
    made = server.make(name)
    made.add(edit.files())
    return made
