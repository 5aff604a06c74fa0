"""Proves what a push does when nothing goes wrong: one commit with the right parent, the same content never twice,
private unless asked otherwise, and other people's files left alone."""

from __future__ import annotations

import threading

import pytest

from diffedit import Edit
from diffedit.errors import (
    HubAccessError,
    HubConflictError,
    HubNotFoundError,
    HubRefusedError,
    HubVisibilityError,
)
from diffedit.io import hub_push
from diffedit.io.measured import Measured, Metric


def test_a_push_makes_a_private_repository_with_one_commit_of_exactly_the_files(server, name, edit, push):
    pushed = push()
    repo = server.repos[name]
    assert repo.private and pushed.private and pushed.created and pushed.pull_request is None
    assert [commit.oid for commit in repo.log()] == [pushed.commit]
    (commit,) = repo.log()
    assert {key: data for key, data in commit.files.items() if key != ".gitattributes"} == edit.files()
    assert pushed.url == f"{server.url}/{name}" and pushed.repo_id == name


def test_the_same_content_is_not_committed_again(server, name, push):
    first, second = push(), push()
    assert first.commit == second.commit and first.created and not second.created
    assert server.count(name)["commit"] == 1 and server.count(name)["preupload"] == 1


def test_content_in_lfs_is_compared_by_its_sha256(server, name, repo, edit, push):
    repo.lfs = True
    assert not push().created
    assert server.count(name)["preupload"] == 0
    repo.add({"edit.safetensors": edit.files()["edit.safetensors"][:-1] + b"x"})
    server.fail(name, "preupload", 400)  # stop here: the upload itself is tested where hf_xet is switched off
    with pytest.raises(HubRefusedError):
        push()
    assert server.count(name)["preupload"] == 1


def test_only_what_differs_is_sent_and_what_is_not_ours_stays(server, name, repo, edit, push):
    repo.add({"README.md": b"old", "photo.png": b"theirs", "before_after.png": b"theirs too"})
    pushed = push()
    (commit, *_) = repo.log()
    assert commit.oid == pushed.commit and commit.parent == repo.log()[1].oid
    assert commit.files["README.md"] == edit.files()["README.md"]
    assert commit.files["photo.png"] == b"theirs" and commit.files["before_after.png"] == b"theirs too"


def test_weights_that_an_earlier_edit_left_go_in_the_same_commit(server, name, repo, edit, push):
    """diffusers and PEFT would load them in place of the new edit's."""
    repo.add({"unet/adapter_model.safetensors": b"an edit of the UNet", "unet/adapter_config.json": b"{}"})
    before = len(repo.log())
    pushed = push()
    assert pushed.created and len(repo.log()) == before + 1
    assert "unet/adapter_model.safetensors" not in repo.at("main").files
    assert not push().created


def test_a_public_repository_is_refused_unless_asked_for(server, name, push):
    repo = server.make(name, private=False)
    with pytest.raises(HubVisibilityError, match="public") as caught:
        push()
    assert "private=False" in caught.value.hint and repo.log() == []
    assert push(private=False).private is False
    assert len(repo.log()) == 1


def test_public_only_when_asked_for(server, name, push):
    assert push(private=False).private is False
    assert server.repos[name].private is False


def test_a_push_never_changes_the_visibility(server, name, repo, push):
    assert push(private=False).private is True and repo.private


def test_a_repository_that_becomes_public_while_it_is_made_is_refused(server, name, push):
    """Somebody else made it between our look and our making it: `exist_ok` must not hide that it is theirs, public."""
    make = server.make
    server.make = lambda repo_id, private: make(repo_id, private=False)
    try:
        with pytest.raises(HubVisibilityError):
            push()
    finally:
        del server.make
    assert server.repos[name].log() == []


def test_a_branch_is_made_from_main_if_it_is_missing(server, name, repo, push):
    repo.add({"README.md": b"changed on main"})
    main = repo.refs["main"]
    pushed = push(revision="v2")
    assert repo.refs["v2"] == pushed.commit and repo.refs["main"] == main
    assert repo.at("v2").parent == main
    assert not push(revision="v2").created


def test_main_is_main_by_name_too(repo, push):
    assert push(revision="main").created is False and list(repo.refs) == ["main"]


def test_a_commit_is_no_branch(repo, push):
    with pytest.raises(HubRefusedError, match="commit cannot be pushed to"):
        push(revision=repo.refs["main"])


@pytest.mark.parametrize("revision", ["refs/pr/7", "../x", "-f", "a b", "", "x/", "a//b", "x\n", "é"])
def test_branches_that_cannot_be(repo, push, revision):
    with pytest.raises(HubNotFoundError):
        push(revision=revision)
    assert list(repo.refs) == ["main"]


@pytest.mark.parametrize(
    "wrong", ["edit", "a/b/c", "../etc", "a/..", "/abs", "me/x y", "me/x.git", "", "hf_Secret1234567"]
)
def test_names_that_no_repository_has(server, edit, wrong):
    with pytest.raises(HubNotFoundError) as caught:
        hub_push.push(edit.files(), wrong, title="x", token="t0ken", endpoint="http://127.0.0.1:9")
    assert "Secret123" not in str(caught.value)


def test_a_pull_request_is_opened_once(server, name, repo, push):
    repo.add({"README.md": b"changed"})
    main = repo.refs["main"]
    first, second = push(create_pr=True), push(create_pr=True)
    assert repo.refs["main"] == main and len(repo.requests) == 1
    assert first.created and not second.created and first.commit == second.commit == repo.refs["refs/pr/1"]
    assert first.pull_request == second.pull_request == f"{server.url}/{name}/discussions/1"


def test_a_pull_request_for_content_that_is_there_is_not_opened(repo, push):
    pushed = push(create_pr=True)
    assert not pushed.created and pushed.pull_request is None and repo.requests == []


def test_a_pull_request_needs_a_repository(server, name, push):
    with pytest.raises(HubNotFoundError):
        push(create_pr=True)
    assert name not in server.repos


def test_somebody_elses_commit_in_between_is_not_overwritten(server, name, repo, edit, push):
    repo.add({"README.md": b"before"})
    server.fail(name, "preupload", 429, times=1)  # gives the other side a second

    threading.Timer(0.4, lambda: repo.add({"README.md": b"theirs"})).start()
    with pytest.raises(HubConflictError) as caught:
        push()
    assert repo.at("main").files["README.md"] == b"theirs" and repo.refs["main"][:12] in str(caught.value)
    assert server.count(name)["commit"] == 1


@pytest.mark.parametrize("token", ["", "two words", "new\nline", "ümlaut", 7])
def test_what_cannot_be_a_token_is_not_shown(server, name, push, token):
    with pytest.raises(HubAccessError, match="not one") as caught:
        push(token=token)
    assert caught.value.value is None and server.count(name) == {}


def test_measurements_are_pushed_pulled_and_pushed_again(server, name, push, edit, pull):
    edit.record(Measured(edit_id=edit.id, metrics=(Metric("efficacy", 0.75),)))
    push()
    again = Edit.load(pull().folder)
    assert again.measured == edit.measured and again.files() == edit.files()
    assert not push(files=again.files()).created, "nothing was lost on the way"
    half = edit * 0.5
    push(files=half.files())
    assert "measured.json" not in server.repos[name].at("main").files, "they are not about what is there now"
