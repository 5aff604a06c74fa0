"""An edit to the Hub: one commit, never twice.

Look at the repository (made first, private, if it is missing) and compare its files with ours by their git or SHA-256
hashes. If they differ, send one commit that names the commit it was made for (`parent_commit`), so that it cannot land
on top of somebody else's. When the reply to it fails, look again before anything is sent again: if our files are there,
it has arrived.

A repository that is public is not pushed to while `private` is asked for, and a push never changes a visibility. A
branch that is missing is made from the main one. The push owns the edit's files and leaves all others alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants

from diffedit.errors import (
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubRefusedError,
    HubUnavailableError,
    HubVisibilityError,
)
from diffedit.io.destination import EDIT_FOLDER_FILES
from diffedit.io.hub_calls import Patience
from diffedit.io.hub_client import COMMIT, Client, Hub, Remote, checked_repo, checked_revision
from diffedit.io.hub_errors import Failure, offline, redact

logger = logging.getLogger("diffedit")

# What an earlier edit may have left there and would be taken for a part of this one. Pictures and other files stay.
_WEIGHTS = frozenset(n for n in EDIT_FOLDER_FILES if n.endswith((".safetensors", ".json")))


@dataclass(frozen=True)
class Pushed:
    """What a push came to.

    Attributes:
        repo_id: "user/name".
        commit: the 40 hexadecimal digits at which the Hub has the edit.
        url: the repository's page.
        created: whether this push made that commit; false if the Hub had the same content already.
        private: whether the repository is private.
        pull_request: page of the pull request, if one was asked for.
    """

    repo_id: str
    commit: str
    url: str
    created: bool
    private: bool
    pull_request: str | None = None


def push(
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    title: str,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    patience: Patience | None = None,
) -> Pushed:
    """Bring an edit's files to the Hub.

    Args:
        files: all files of the edit, by name.
        repo_id: "user/name"; made if it is missing (not for a pull request).
        title: of the commit or pull request; the same edit should have the same.
        private: make the repository private, and refuse one that is public. With false it is made public, or used as
            it is.
        revision: branch to push to, made from the main one if it is missing; default: the main one.
        create_pr: open a pull request; with `revision`, against that branch.
        token: default: the one that huggingface_hub finds.
        endpoint: address of the Hub; default: huggingface_hub's own.
        patience: how long to try.

    Raises:
        HubOfflineError: `HF_HUB_OFFLINE` is set.
        HubAccessError: no token, or one that may not do this.
        HubNotFoundError: a pull request to a repository or branch that is not there.
        HubVisibilityError: the repository is public and `private` is set.
        HubConflictError: somebody else committed meanwhile.
        HubRefusedError: the Hub does not take the content.
        HubUnavailableError: the Hub failed or did not answer in time.
    """
    if constants.HF_HUB_OFFLINE:
        raise offline(checked_repo(repo_id))
    if revision is not None and COMMIT.fullmatch(checked_revision(revision)):
        raise HubRefusedError("a commit cannot be pushed to", value=revision, hint="name a branch")
    hub = Hub(repo_id, token, endpoint, patience or Patience())
    if not hub.has_token:
        raise HubAccessError("there is no token", value=repo_id, hint="log in with `hf auth login`, or set HF_TOKEN")
    branch = None if revision == constants.DEFAULT_REVISION else revision
    remote = _find(hub, branch, private, create_pr)
    job = _Push(hub, files, title, branch, remote, create_pr)
    pushed = job.arrived(remote, created=False) or (job.open_request(created=False) if create_pr else None)
    pushed = pushed or job.commit()
    logger.info("%s %s at %s", "pushed" if pushed.created else "found", pushed.repo_id, pushed.commit)
    return pushed


def _find(hub: Hub, branch: str | None, private: bool, create_pr: bool) -> Remote:
    """The branch's head; makes the repository and the branch if they are missing."""
    try:
        remote = hub.look(None)
    except HubNotFoundError:
        if create_pr:
            raise
        hub.calls.patiently(lambda: hub.client().create_repo(hub.repo_id, private=private, exist_ok=True))
        remote = hub.look(None)
    if private and remote.private is not True:
        raise HubVisibilityError(
            "the repository is public"
            if remote.private is False
            else "the server does not say who sees the repository",
            value=hub.repo_id,
            cause="a private push was asked for (the default), and a push never changes a repository's visibility",
            hint="push with private=False (--public), or make the repository private on its page first",
        )
    if branch is None:
        return remote
    try:
        return hub.look(branch)
    except HubNotFoundError:
        if create_pr or branch.startswith("refs/"):
            raise
    start = remote.commit
    hub.calls.patiently(lambda: hub.client().create_branch(hub.repo_id, branch=branch, revision=start, exist_ok=True))
    return hub.look(branch)


@dataclass(frozen=True)
class _Push:
    """One push, once it is known what it starts from (`parent`)."""

    hub: Hub
    files: Mapping[str, bytes]
    title: str
    branch: str | None
    parent: Remote
    create_pr: bool

    def commit(self) -> Pushed:
        """Send the commit until it is there, or for certain is not to be."""
        number = 0
        while True:
            client = self.hub.client()
            outcome = self.hub.calls.once(lambda: self._send(client), share=0.5, given_up=client.given_up)  # noqa: B023
            if not isinstance(outcome, Failure):
                return outcome
            conflict = isinstance(outcome.error, HubConflictError)
            if not outcome.retry and not conflict:
                raise outcome.error
            found = None if outcome.refused and not conflict else self._check(outcome, ours=number > 0 or not conflict)
            if found is not None:
                return found
            if conflict:
                raise outcome.error
            if self.create_pr and not outcome.refused:  # nothing but our patience would keep two requests apart
                raise _unsure(outcome)
            self.hub.calls.rest(number, outcome)
            number += 1

    def arrived(self, remote: Remote, *, created: bool, pull_request: str | None = None) -> Pushed | None:
        """The result, if `remote` has all our files and no weights of another edit."""
        same = all(name in remote.files and remote.files[name].holds(data) for name, data in self.files.items())
        if not same or self._stale(remote):
            return None
        return self._pushed(remote.commit, created, pull_request)

    def open_request(self, *, created: bool) -> Pushed | None:
        """The result, if an open pull request of our title holds our files already."""

        def ours() -> list[tuple[int, str]]:
            found = self.hub.client().get_repo_discussions(
                self.hub.repo_id, discussion_type="pull_request", discussion_status="open"
            )
            return [(entry.num, entry.url) for entry in found if entry.title == self.title]

        for number, url in self.hub.calls.patiently(ours):
            pushed = self.arrived(self.hub.look(f"refs/pr/{number}"), created=created, pull_request=url)
            if pushed is not None:
                return pushed
        return None

    def _check(self, failure: Failure, *, ours: bool) -> Pushed | None:
        """After a commit without a proper reply: the result if it has arrived, `None` if nothing has happened."""
        try:
            if self.create_pr:
                return self.open_request(created=ours)
            remote = self.hub.look(self.branch)
        except HubError:
            raise _unsure(failure) from None
        pushed = self.arrived(remote, created=ours)
        if pushed is None and remote.commit != self.parent.commit:
            raise HubConflictError(
                "somebody else committed meanwhile",
                value=f"{self.hub.repo_id}, was {self.parent.commit[:12]}, is {remote.commit[:12]}",
                hint="look at that commit, then push again",
            )
        return pushed

    def _send(self, client: Client) -> Pushed:
        changed = [
            name
            for name, data in sorted(self.files.items())
            if name not in self.parent.files or not self.parent.files[name].holds(data)
        ]
        operations = [
            *(CommitOperationAdd(name, self.files[name]) for name in changed),
            *(CommitOperationDelete(name) for name in self._stale(self.parent)),
        ]
        done = client.create_commit(
            self.hub.repo_id,
            operations,
            commit_message=self.title,
            revision=self.branch,
            create_pr=self.create_pr,
            parent_commit=self.parent.commit,
        )
        if not COMMIT.fullmatch(str(done.oid)):
            raise ValueError(f"no commit hash: {str(done.oid)[:60]}")
        return self._pushed(done.oid, done.oid != self.parent.commit, done.pr_url)

    def _stale(self, remote: Remote) -> list[str]:
        return sorted(_WEIGHTS & remote.files.keys() - self.files.keys())

    def _pushed(self, commit: str, created: bool, pull_request: str | None) -> Pushed:
        page = f"{self.hub.client().endpoint}/{self.hub.repo_id}"
        request = None if pull_request is None else redact(pull_request)
        return Pushed(self.hub.repo_id, commit, redact(page), created, bool(self.parent.private), request)


def _unsure(failure: Failure) -> HubError:
    error = failure.error
    return HubUnavailableError(
        error.case,
        value=error.value,
        cause=f"{error.cause or 'no more is known'}; whether the commit arrived is not known",
        hint="run the same again: what has arrived is not sent twice",
    )
