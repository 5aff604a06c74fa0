"""One repository of the Hub as `hub` and `hub_push` see it: what it holds, who asks, how long.

Files are compared by the hashes that the Hub lists, git's for what lies in git and SHA-256 for what lies outside, so
that nothing is downloaded to find out that it is the same.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from diffedit._version import __version__
from diffedit.errors import HubAccessError, HubNotFoundError, IntegrityError
from diffedit.io.hub_calls import Calls, Patience
from diffedit.io.hub_errors import Failure, redact
from diffedit.io.names import hub_id

COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"(?![-./])(?!.*(?:\.\.|//|/\.|@\{))[\w.+#@/-]{1,200}(?<![/.])", re.ASCII)
_TOKEN = re.compile(r"[!-~]{1,4000}")


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says about a file: its size, its git blob, and its SHA-256 if it is stored outside git."""

    size: int | None
    blob: str | None
    sha256: str | None

    @property
    def unknown(self) -> bool:
        """Whether the server lists no hash; then only what the file says about itself can be checked."""
        return self.blob is None and self.sha256 is None

    def holds(self, data: bytes) -> bool:
        """Whether the file's content is `data`, as far as its hashes tell."""
        if self.sha256 is not None:
            return self.sha256 == hashlib.sha256(data).hexdigest()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        return self.blob == git.hexdigest()


@dataclass(frozen=True)
class Remote:
    """A repository at one commit; `private` is `None` if the server does not say."""

    commit: str
    private: bool | None
    files: Mapping[str, RemoteFile]


class Client(HfApi):  # type: ignore[misc]  # the stub-less library is Any to mypy
    """`HfApi` that sends no commit once nobody waits for it (see `Calls.once`)."""

    def __init__(self, endpoint: str | None, token: str | None) -> None:
        super().__init__(endpoint=endpoint, token=token, library_name="diffedit", library_version=__version__)
        self.given_up = threading.Event()

    def preupload_lfs_files(self, *args: Any, **options: Any) -> None:
        """The step before the commit; it retries by itself for as long as the server asks it to."""
        super().preupload_lfs_files(*args, **options)
        if self.given_up.is_set():
            raise TimeoutError("given up before the commit")


class Hub:
    """One repository, with an identity and a deadline.

    Args:
        repo_id: "user/name".
        token: default: the one that huggingface_hub finds.
        endpoint: address of the Hub; default: huggingface_hub's own.
        patience: how long to try.

    Raises:
        HubNotFoundError: no repository can have that name.
        HubAccessError: the token cannot be one.
    """

    def __init__(self, repo_id: str, token: str | None, endpoint: str | None, patience: Patience) -> None:
        self.repo_id = checked_repo(repo_id)
        self.calls = Calls(self.repo_id, patience)
        found = self.calls.once(get_token) if token is None else token  # finding it may need the network
        if isinstance(found, Failure):
            raise found.error
        if found is not None and (not isinstance(found, str) or not _TOKEN.fullmatch(found)):
            raise HubAccessError("the token is not one", cause="it is empty or holds blanks", hint="copy it again")
        self.calls.secrets += [found] if found else []
        self.has_token = found is not None
        self.endpoint, self._token = endpoint, token

    def client(self) -> Client:
        """A fresh client."""
        return Client(self.endpoint, self._token)

    def look(self, revision: str | None) -> Remote:
        """The repository at a revision; one request, repeated if it fails.

        Raises:
            HubError: it cannot be seen.
        """

        def ask() -> Remote:
            info = self.client().model_info(
                self.repo_id, revision=revision, files_metadata=True, timeout=self.calls.remaining
            )
            if not COMMIT.fullmatch(str(info.sha)):
                raise ValueError(f"no commit hash: {str(info.sha)[:60]}")
            files = {
                file.rfilename: RemoteFile(file.size, file.blob_id, file.lfs.sha256 if file.lfs else None)
                for file in info.siblings or ()
            }
            return Remote(info.sha, info.private, files)

        return self.calls.patiently(ask)

    def fetch(self, commit: str, name: str, limit: int) -> bytes:
        """The content of a file at a commit, into memory; repeated if it fails.

        Raises:
            HubError: it cannot be had.
            IntegrityError: it is longer than `limit` bytes.
        """
        headers = build_hf_headers(token=self._token, library_name="diffedit", library_version=__version__)
        url = hf_hub_url(self.repo_id, name, revision=commit, endpoint=self.client().endpoint)

        def get() -> bytes:
            data = bytearray()
            options = {"headers": headers, "timeout": self.calls.remaining, "follow_redirects": True}
            with get_session().stream("GET", url, **options) as reply:
                hf_raise_for_status(reply)
                for chunk in reply.iter_bytes():
                    data += chunk
                    if len(data) > limit:
                        raise IntegrityError(f"{name} is too large for an edit", value=f"limit {limit} bytes")
            return bytes(data)

        return self.calls.patiently(get)


def checked_repo(repo_id: object) -> str:
    """`repo_id`, if a repository can have that name.

    Raises:
        HubNotFoundError: none can.
    """
    if not isinstance(repo_id, str) or hub_id(repo_id) is None:
        raise HubNotFoundError(
            "that is no repository of the Hub", value=repr(redact(repo_id)), hint="name it as user/name"
        )
    return repo_id


def checked_revision(revision: object) -> str:
    """`revision`, if a branch, tag or commit can have that name.

    Raises:
        HubNotFoundError: none can.
    """
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision):
        raise HubNotFoundError(
            "no revision can have that name", value=repr(redact(revision)), hint="name a branch, a tag or a commit"
        )
    return revision
