"""An edit from the Hub: at one commit, only its own files, checked.

The revision is resolved to a commit first. From that commit come the files that `Edit.load` reads, each compared with
the hash that the Hub lists, into huggingface_hub's cache:

    <HF_HUB_CACHE>/models--user--name/snapshots/<commit>/edit.safetensors, pairs.safetensors, measured.json
    <HF_HUB_CACHE>/models--user--name/refs/<branch or tag>                 the commit it stood for

No other name in the repository is looked at, so none can lead anywhere. The files are written here and not by
`hf_hub_download`, since that takes names for files from the server's replies: an ETag of `../../x` leads out of the
cache (huggingface_hub 2.4), and HF_ENDPOINT may be anybody's. Here every part of a path has been checked.

Where the Hub is, who we are and where the cache lies is huggingface_hub's business (`HF_ENDPOINT`, `HF_TOKEN`,
`HF_HOME`, `HF_HUB_OFFLINE`). The token is passed on and kept nowhere. `hub_push` is the other direction.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from diffedit.errors import HubConflictError, HubNotFoundError, HubOfflineError, IntegrityError
from diffedit.io.container import MAX_FILE
from diffedit.io.files import EDIT_FILE
from diffedit.io.hub_calls import Patience
from diffedit.io.hub_client import COMMIT, Hub, Remote, checked_repo, checked_revision
from diffedit.io.hub_errors import offline, redact
from diffedit.io.measured import MEASURED_FILE
from diffedit.io.pairs import PAIRS_FILE
from diffedit.storage import discard, read_regular, storage_errors, sweep, temporary_path, write_durable

logger = logging.getLogger("diffedit")

# The edit comes last: a cache that has it has the rest.
PULLED_FILES = (PAIRS_FILE, EDIT_FILE)
# Fetched before them if the commit has it, and not missed otherwise.
MAY_BE_PULLED = (MEASURED_FILE,)


@dataclass(frozen=True)
class Pulled:
    """An edit in the local cache.

    Attributes:
        folder: holds the edit's files, for `Edit.load`.
        repo_id: "user/name".
        commit: 40 hexadecimal digits.
    """

    folder: Path
    repo_id: str
    commit: str

    @property
    def origin(self) -> str:
        """Where it came from, for ever: "user/name@commit"."""
        return f"{self.repo_id}@{self.commit}"


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
    patience: Patience | None = None,
) -> Pulled:
    """Fetch an edit's files into the local cache.

    Args:
        repo_id: "user/name", or "user/name@commit".
        revision: branch, tag or commit; default: the main branch. A cached commit needs no network.
        token: default: the one that huggingface_hub finds.
        cache_dir: default: huggingface_hub's cache.
        local_files_only: take what the cache holds and never ask the network.
        endpoint: address of the Hub; default: huggingface_hub's own.
        patience: how long to try.

    Raises:
        HubNotFoundError: no such repository or revision, or no edit in it.
        HubAccessError: it is not for this token.
        HubConflictError: a tag names another commit than when it was last pulled.
        HubOfflineError: the network is switched off and the cache does not hold it.
        HubUnavailableError: the Hub failed or did not answer in time.
        IntegrityError: what arrived is not what the Hub lists.
    """
    repo_id, revision = _pinned(repo_id, revision)
    known = _cached(repo_id, revision, cache_dir)
    if local_files_only or constants.HF_HUB_OFFLINE:
        if known is None:
            raise _not_cached(repo_id, revision, local_files_only)
        return known
    complete = known is not None and all((known.folder / name).is_file() for name in PULLED_FILES)
    if known is not None and complete and revision is not None and COMMIT.fullmatch(revision):
        return known
    hub = Hub(repo_id, token, endpoint, patience or Patience())
    remote = hub.look(revision)
    if EDIT_FILE not in remote.files:
        hint = "name a repository that diffedit pushed to; plain LoRAs are loaded by diffusers"
        where = f"{repo_id}, {EDIT_FILE} is missing"
        raise HubNotFoundError("the repository holds no edit", value=where, hint=hint)
    if revision is not None and known is not None and known.commit != remote.commit:
        _refuse_moved_tag(hub, revision, known.commit, remote.commit)
    folder = _repo_folder(repo_id, cache_dir) / "snapshots" / remote.commit
    for name in (*MAY_BE_PULLED, *PULLED_FILES):
        if name in remote.files:
            _fetch(hub, remote, name, folder)
    _remember(repo_id, revision, remote.commit, cache_dir)
    pulled = Pulled(folder, repo_id, remote.commit)
    logger.info("pulled %s", pulled.origin)
    return pulled


def _pinned(repo_id: object, revision: str | None) -> tuple[str, str | None]:
    """Name and revision, the latter also from "user/name@revision"."""
    name, at, inside = repo_id.partition("@") if isinstance(repo_id, str) else (repo_id, "", "")
    if at and revision is not None and revision != inside:
        raise HubNotFoundError(
            "two revisions are named", value=f"{redact(inside)} and {redact(revision)}", hint="leave one out"
        )
    chosen = inside if at else revision
    return checked_repo(name), None if chosen is None else checked_revision(chosen)


def _cached(repo_id: str, revision: str | None, cache_dir: str | Path | None) -> Pulled | None:
    """What the cache holds under that revision's name; asks nobody."""
    path = try_to_load_from_cache(
        repo_id, EDIT_FILE, cache_dir=cache_dir, revision=revision or constants.DEFAULT_REVISION
    )
    if not isinstance(path, str) or not COMMIT.fullmatch(Path(path).parent.name):
        return None
    return Pulled(Path(path).parent, repo_id, Path(path).parent.name)


def _not_cached(repo_id: str, revision: str | None, local_files_only: bool) -> HubOfflineError:
    if not local_files_only:
        error = offline(repo_id)
        return HubOfflineError(
            "the edit is not in the local cache, and the Hub is switched off",
            value=f"{repo_id} at {revision or constants.DEFAULT_REVISION}",
            cause=error.cause,
            hint="pull it once while online",
        )
    return HubOfflineError(
        "the edit is not in the local cache",
        value=f"{repo_id} at {revision or constants.DEFAULT_REVISION}",
        hint="pull it once without local_files_only",
    )


def _refuse_moved_tag(hub: Hub, revision: str, before: str, now: str) -> None:
    """A branch moves, a tag must not: whoever pinned one would get another edit under the same name."""
    tags = {tag.name for tag in hub.calls.patiently(lambda: hub.client().list_repo_refs(hub.repo_id)).tags}
    if revision in tags:
        raise HubConflictError(
            f"the tag {revision!r} names another commit than before",
            value=f"{hub.repo_id}, before {before[:12]}, now {now[:12]}",
            cause="its owner moved it",
            hint=f"name the commit that you want: {now} or {before}",
        )
    logger.info("%s moved from %s to %s", revision, before[:12], now[:12])


def _fetch(hub: Hub, remote: Remote, name: str, folder: Path) -> None:
    """Have one file of the commit in `folder`, checked against the Hub's list; asks only for what is not there."""
    listed, path = remote.files[name], folder / name
    if listed.size is not None and listed.size > MAX_FILE:
        raise IntegrityError(f"{name} is too large for an edit", value=f"{listed.size} bytes, limit {MAX_FILE}")
    if path.is_file():
        with storage_errors(path):
            if listed.holds(read_regular(path, MAX_FILE + 1)):
                return
    for _ in range(2):
        data = hub.fetch(remote.commit, name, MAX_FILE)
        if listed.holds(data) or listed.unknown:
            with storage_errors(path):
                _keep(path, data)
            return
    raise IntegrityError(
        f"{name} is not what the Hub lists",
        value=hub.repo_id,
        cause="it was damaged on the way",
        hint="try another network, or another HF_ENDPOINT",
    )


def _remember(repo_id: str, revision: str | None, commit: str, cache_dir: str | Path | None) -> None:
    """Note which commit a name stands for, for later without a network. A cache that is read-only goes without."""
    name = revision or constants.DEFAULT_REVISION
    if not COMMIT.fullmatch(name):
        with suppress(OSError):
            _keep(_repo_folder(repo_id, cache_dir) / "refs" / name, commit.encode("ascii"))


def _repo_folder(repo_id: str, cache_dir: str | Path | None) -> Path:
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / f"models--{repo_id.replace('/', '--')}"


def _keep(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    temporary = temporary_path(path.parent)
    try:
        write_durable(temporary, data)
        os.replace(temporary, path)
    finally:
        discard(temporary)
