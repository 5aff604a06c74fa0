"""Proves what a pull brings: the edit at one commit, from the Hub or from the cache, checked, and nothing else of the
repository, whatever its files are called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffedit import Edit
from diffedit.errors import (
    HubAccessError,
    HubConflictError,
    HubNotFoundError,
    HubOfflineError,
    HubUnavailableError,
    IntegrityError,
    RequestError,
    StorageError,
    UnsafeFormatError,
)
from diffedit.io import hub

HOSTILE = [
    *(f"{'../' * depth}{name}" for depth in range(1, 8) for name in ("edit.safetensors", "pwned.py", "etc/passwd")),
    "/etc/passwd", "/tmp/diffedit-pwned", "//host/share/x", "///x", "~/.bashrc", "~root/x", "$HOME/x", "`id`", "$(id)",
    "C:\\Windows\\win.ini", "C:/Windows/win.ini", "C:x", "\\\\host\\share\\x", "\\\\?\\C:\\x", "\\x", "..\\..\\x",
    "CON", "NUL.safetensors", "aux", "LPT1.txt", "trailing.", "trailing ", " leading", "name:stream", "a/../../b",
    "a/..", ".", "..", "...", "./edit.safetensors", "a//b", "nul\0byte", "new\nline", "\u202egnp.exe", "cafe\u0301",
    "%2e%2e/x", "..%2f..%2fx", "%00", ".git/hooks/post-checkout", ".git/config", "setup.py", "modeling.py",
    "pipeline.py", "__init__.py", "x" * 300, "x.pkl", "pytorch_model.bin", "model.ckpt", "EDIT.SAFETENSORS",
    "edit.safetensors/x", "-rf",
]  # fmt: skip


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_what_was_pushed_is_what_is_pulled(repo, name, edit, pull):
    pulled = pull()
    assert pulled.commit == repo.refs["main"] and pulled.origin == f"{name}@{pulled.commit}"
    again = Edit.load(pulled.folder)
    assert again.id == edit.id and again.files() == edit.files() and again.delta.pairs


def test_only_the_two_files_that_are_read_are_fetched(server, name, repo, pull):
    pulled = pull()
    assert {path for route, path in server.seen[name] if route == "file"} == set(hub.PULLED_FILES)
    assert {path.name for path in pulled.folder.iterdir()} == set(hub.PULLED_FILES)


def test_an_edit_without_pairs_is_pulled_too(server, name, edit, pull):
    files = {key: data for key, data in edit.files().items() if key != "pairs.safetensors"}
    server.make(name).add(files)
    again = Edit.load(pull().folder)
    assert again.id == edit.id and not again.delta.pairs


def test_a_commit_in_the_cache_needs_no_network(server, name, repo, pull):
    first = pull()
    asked = len(server.seen[name])
    assert pull(revision=first.commit) == pull(repo=first.origin) == first
    assert len(server.seen[name]) == asked


def test_an_old_commit_stays_within_reach(repo, edit, pull):
    old = repo.refs["main"]
    repo.add({"edit.safetensors": b"something else by now"})
    assert Edit.load(pull(revision=old).folder).id == edit.id
    assert Edit.load(pull(repo=f"{pull(revision=old).repo_id}@{old}").folder).id == edit.id


def test_branches_move_and_are_followed(repo, edit, pull):
    first = pull()
    repo.add({"edit.safetensors": edit.files()["edit.safetensors"], "new.txt": b"x"})
    second = pull()
    assert second.commit == repo.refs["main"] != first.commit
    repo.refs["v2"] = first.commit
    assert pull(revision="v2").commit == first.commit
    repo.refs["v2"] = second.commit
    assert pull(revision="v2").commit == second.commit


def test_a_tag_that_moved_is_refused_and_both_commits_are_named(repo, pull):
    repo.tags.add("v1.0")
    first = repo.refs["v1.0"] = repo.refs["main"]
    assert pull(revision="v1.0").commit == pull(revision="v1.0").commit == first
    second = repo.refs["v1.0"] = repo.add({"new.txt": b"x"})
    with pytest.raises(HubConflictError, match="another commit") as caught:
        pull(revision="v1.0")
    assert first in caught.value.hint and second in caught.value.hint
    assert pull(revision=second).commit == second


def test_a_branch_that_moves_during_the_pull_gives_the_commit_that_was_resolved(server, repo, edit, pull):
    """The name stands for another commit at the second look; what was resolved and recorded is what is fetched."""
    resolved = repo.refs["main"]
    at = repo.at

    def move(revision):
        found = at(revision)
        if revision == resolved:  # the first file is asked for by its commit
            repo.add({"edit.safetensors": b"an attack"})
        return found

    repo.at = move
    pulled = pull()
    assert pulled.commit == resolved and Edit.load(pulled.folder).id == edit.id


def test_offline_the_cache_answers_by_name_and_by_commit(server, name, repo, pull):
    first = pull()
    asked = len(server.seen[name])
    assert pull(local_files_only=True) == pull(local_files_only=True, revision=first.commit) == first
    assert len(server.seen[name]) == asked


def test_offline_without_the_cache(server, name, repo, pull):
    with pytest.raises(HubOfflineError, match="not in the local cache"):
        pull(local_files_only=True)
    with pytest.raises(HubOfflineError):
        pull(local_files_only=True, revision="0" * 40)
    assert name not in server.seen


def test_an_unreachable_hub_is_an_error_even_if_the_cache_has_something(server, name, repo, pull):
    """It might be an old one; whoever wants that says so."""
    first = pull()
    server.fail(name, "info", 503)
    with pytest.raises(HubUnavailableError):
        pull()
    assert pull(local_files_only=True) == first


def test_a_damaged_cache_is_mended(repo, edit, pull):
    pulled = pull()
    blob = (pulled.folder / "edit.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError):
        Edit.load(pulled.folder)
    assert Edit.load(pull().folder).files() == edit.files()


@pytest.mark.parametrize("lfs", [False, True])
def test_a_file_that_is_not_what_the_hub_lists_is_refused(repo, edit, pull, lfs):
    repo.lfs = lfs
    repo.served = {"edit.safetensors": edit.files()["edit.safetensors"][:-1] + b"x"}
    with pytest.raises(IntegrityError, match="not what the Hub lists"):
        pull()
    repo.served = {}
    assert Edit.load(pull().folder).id == edit.id


@pytest.mark.parametrize("files", [{}, {"pytorch_lora_weights.safetensors": b"a LoRA"}])
def test_a_repository_without_an_edit(server, name, pull, files):
    server.make(name).add({**files, "README.md": b"hello"})
    with pytest.raises(HubNotFoundError, match="holds no edit"):
        pull()


def test_what_is_not_an_edit_is_refused_by_the_reader(server, name, pull):
    server.make(name).add({"edit.safetensors": b"\x80\x04pickle"})
    with pytest.raises(UnsafeFormatError):
        Edit.load(pull().folder)


def test_private_repositories_and_wrong_tokens(repo, pull):
    with pytest.raises(HubAccessError, match="Invalid credentials"):
        pull(token="hf_WrongWrongWrong")


def test_revisions_that_are_not_there(repo, pull):
    with pytest.raises(HubNotFoundError, match="no such revision"):
        pull(revision="v9")


@pytest.mark.parametrize("revision", ["../main", "a b", "", "-x", "/x", "x/", "a\0b", "x" * 300, "refs/../x"])
def test_revisions_that_cannot_be(server, name, repo, pull, revision):
    with pytest.raises(HubNotFoundError, match="no revision"):
        pull(revision=revision)
    assert name not in server.seen


def test_two_revisions_at_once(repo, name, pull):
    with pytest.raises(HubNotFoundError, match="two revisions"):
        pull(repo=f"{name}@v1", revision="v2")


def test_a_name_that_is_neither_a_folder_nor_a_repository(tmp_path):
    for wrong in ("no-such-folder", "a/b/c", "./no/such", str(tmp_path / "none")):
        with pytest.raises(StorageError, match="no such file or folder"):
            Edit.from_pretrained(wrong)


@pytest.mark.parametrize("wrong", [None, 7, b"me/edit"])
def test_what_is_no_name_at_all(wrong):
    with pytest.raises(StorageError, match="loaded from a path"):
        Edit.from_pretrained(wrong)


def test_a_folder_that_is_there_wins(tmp_path, edit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit.save("me/edit")
    again = Edit.from_pretrained("me/edit")
    assert again.id == edit.id and again.origin is None
    with pytest.raises(RequestError, match="no revisions"):
        Edit.from_pretrained("me/edit", revision="v1")


def test_no_name_in_a_repository_leads_out_of_the_cache(server, name, repo, edit, pull, tmp_path):
    assert len(set(HOSTILE)) >= 60
    repo.listed = {path: b"pwned" for path in HOSTILE}
    (tmp_path / "around").mkdir()
    before = tree(tmp_path)
    pulled = pull(cache_dir=tmp_path / "around" / "cache")
    assert Edit.load(pulled.folder).id == edit.id
    asked = {path for _, path in server.seen[name]} - {""}
    assert asked == set(hub.PULLED_FILES)
    new = tree(tmp_path) - before
    assert new and all(path.startswith("around/cache") for path in new)
    assert not any(b"pwned" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    shutil.rmtree(tmp_path / "around")


@pytest.mark.parametrize("header", ["X-Repo-Commit", "ETag"])
@pytest.mark.parametrize("value", ["../" * 5 + "x", "../" * 3 + "x", "..\\..\\x", "main"])
def test_a_server_that_lies_about_names_writes_nothing_outside(repo, edit, pull, tmp_path, header, value):
    """huggingface_hub's own download writes to where such an ETag leads."""
    repo.headers = {header: value}
    before = tree(tmp_path)
    pulled = pull(cache_dir=tmp_path / "around" / "it" / "cache")
    assert Edit.load(pulled.folder).id == edit.id
    assert all((tmp_path / path).is_dir() or path.startswith("around/it/cache") for path in tree(tmp_path) - before)


@pytest.mark.parametrize("commit", ["../" * 5 + "x", "main", "", "A" * 40, "0" * 39, "0" * 40 + "\n"])
def test_a_server_that_lies_about_the_commit_is_not_believed(repo, pull, tmp_path, commit):
    repo.at("main").oid = commit
    before = tree(tmp_path)
    with pytest.raises(HubUnavailableError, match="cannot be understood"):
        pull()
    assert tree(tmp_path) == before
