"""What the Hub's failures mean: every status code and broken connection as one of our errors, without any secret.

Exceptions are told apart by the names of their classes and by the reply that they carry, not by `isinstance`:
huggingface_hub 1 speaks httpx and huggingface_hub 2 httpx2, and the two share names but no base. A reply may repeat
what was sent to it, so nothing of it is shown before `redact`, and our errors are never chained to the library's,
whose requests carry the token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from diffedit.errors import (
    DiffEditError,
    HubAccessError,
    HubConflictError,
    HubNotFoundError,
    HubOfflineError,
    HubRefusedError,
    HubUnavailableError,
    StorageError,
)

_HIDDEN = "<hidden>"
_SECRETS = (
    (re.compile(r"(?i)\b(hf|api_org)_[A-Za-z0-9]{10,}"), _HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[^\s'\",;]+"), rf"\1 {_HIDDEN}"),
    (re.compile(r"(?i)\b((?:access_)?token|api_key|key|password|secret|signature)=[^&\s'\"]+"), rf"\1={_HIDDEN}"),
    (re.compile(r"(\w://)[^/@\s]+@"), rf"\1{_HIDDEN}@"),
)
_LONGEST = 240
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_AGAIN = "check the network, HF_ENDPOINT and any proxy, then run the same again; what has arrived is not sent twice"
_RATE_LIMIT = re.compile(r"\br=0\s*;\s*t=(\d+)")


@dataclass(frozen=True)
class Failure:
    """One failed call.

    Attributes:
        error: what to raise if this is the end of it.
        retry: whether the same call may work in a moment.
        refused: whether the Hub certainly did not do what was asked. A broken connection leaves that open.
        wait: seconds that the Hub asks to wait.
    """

    error: DiffEditError
    retry: bool = False
    refused: bool = False
    wait: float | None = None


def redact(text: object, secrets: Iterable[str] = ()) -> str:
    """One line of printable text without `secrets` and without anything that looks like one.

    >>> redact("GET https://me:pw@hub.example/x?token=abc Bearer hf_0123456789")
    'GET https://<hidden>@hub.example/x?token=<hidden> Bearer <hidden>'
    """
    line = str(text)
    for secret in secrets:
        line = line.replace(secret, _HIDDEN)
    for pattern, shown in _SECRETS:
        line = pattern.sub(shown, line)
    line = " ".join("".join(char if char.isprintable() else " " for char in line).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def explain(error: BaseException, repo_id: str, secrets: Iterable[str] = ()) -> Failure:
    """What an exception of huggingface_hub, of its HTTP client or of the file system means.

    Args:
        error: the exception.
        repo_id: what the call was about.
        secrets: texts that must not be shown, such as the token.
    """
    if isinstance(error, DiffEditError):
        return Failure(error)
    names = {cls.__name__ for cls in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return _by_status(error, status, repo_id, tuple(secrets))
    if "OfflineModeIsEnabled" in names:
        return Failure(offline(repo_id))
    if error.__cause__ is not None and names & {"LocalEntryNotFoundError", "ValueError"}:
        return explain(error.__cause__, repo_id, secrets)  # huggingface_hub wraps what went wrong in these two
    value, said = redact(repo_id, secrets), f"{type(error).__name__}: {redact(error, secrets)}"
    if "FileMetadataError" in names:
        case = "the server does not answer as a Hub does"
        return Failure(HubUnavailableError(case, value=value, cause=said, hint="check HF_ENDPOINT and any proxy"))
    if names & {"ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"}:
        return _broken("the Hub cannot be reached", value, said)
    if names & {"TimeoutException", "TimeoutError"}:
        return _broken("the Hub did not answer in time", value, said)
    if names & {"TransportError", "ConnectionError"}:
        return _broken("the connection to the Hub broke", value, said)
    if isinstance(error, OSError) and error.errno is not None:
        where = "free some space, or choose another cache with HF_HOME or cache_dir"
        return Failure(StorageError("the local cache of the Hub cannot be used", value=value, cause=said, hint=where))
    return _broken("the Hub's reply cannot be understood", value, said)


def offline(repo_id: str) -> HubOfflineError:
    """The error for anything that needs the network while `HF_HUB_OFFLINE` forbids it."""
    return HubOfflineError(
        "this needs the Hub, and the Hub is switched off",
        value=redact(repo_id),
        cause="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set",
        hint="unset it to go online",
    )


def timed_out(repo_id: str, seconds: float) -> Failure:
    """The failure of a call that gave no answer within `seconds`."""
    return _broken("the Hub did not answer in time", redact(repo_id), f"no answer within {seconds:.3g} seconds")


def _broken(case: str, value: str, cause: str) -> Failure:
    return Failure(HubUnavailableError(case, value=value, cause=cause, hint=_AGAIN), retry=True)


def _by_status(error: BaseException, status: int, repo_id: str, secrets: tuple[str, ...]) -> Failure:
    headers = getattr(error, "response").headers  # noqa: B009 (only errors with a reply come here)
    said = redact(getattr(error, "server_message", None) or "", secrets)
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown status"
    parts = {
        "value": f"{redact(repo_id, secrets)}, {status} {phrase}",
        "cause": f"the Hub says: {said}" if said else None,
    }
    code = headers.get("X-Error-Code")
    if code == "GatedRepo":
        hint = "ask for access on the repository's page, then log in with that account"
        return _refused(HubAccessError("the repository is gated", **parts, hint=hint))
    if status == 401:
        parts["cause"] = parts["cause"] or (
            "the token is wrong or has expired"
            if secrets
            else "no token was sent; the Hub answers so for private and for missing repositories alike"
        )
        return _refused(HubAccessError("the Hub does not know who is asking", **parts, hint=_LOG_IN))
    if status == 403:
        hint = "use a token that may do this (write permission to push) in that namespace"
        return _refused(HubAccessError("the token does not allow this", **parts, hint=hint))
    if status == 404:
        return _refused(_not_found(code, parts))
    if status in (409, 412):
        hint = "look at the repository's latest commit, then run the same again"
        return _refused(HubConflictError("the repository changed meanwhile", **parts, hint=hint))
    if status == 429:
        wait = _wait(headers)
        hint = "wait a while and run the same again" if wait is None else f"wait {wait:.0f} seconds and run it again"
        limited = HubUnavailableError("the Hub asks to slow down", **parts, hint=hint)
        return Failure(limited, retry=True, refused=True, wait=wait)
    if status == 408 or status >= 500:
        failed = HubUnavailableError("the Hub failed", **parts, hint=_AGAIN)
        return Failure(failed, retry=True, wait=_wait(headers))
    if status == 413:
        return _refused(HubRefusedError("a file is too large for the Hub", **parts, hint="push fewer or smaller edits"))
    hint = "correct what the Hub names, or upgrade huggingface_hub"
    return _refused(HubRefusedError("the Hub refuses the request", **parts, hint=hint))


def _refused(error: DiffEditError) -> Failure:
    return Failure(error, refused=True)


def _not_found(code: str | None, parts: dict[str, str | None]) -> HubNotFoundError:
    if code == "RevisionNotFound":
        case, hint = "the repository has no such revision", "name a branch, a tag or a commit that exists"
    elif code == "EntryNotFound":
        case, hint = "the repository holds no edit", "name a repository that diffedit pushed to"
    else:
        case = "the Hub has no such repository, or this token may not see it"
        hint = "check the spelling; a private repository needs a token of its owner"
    return HubNotFoundError(case, **parts, hint=hint)


def _wait(headers: object) -> float | None:
    """Seconds that a reply asks to wait: `Retry-After` (seconds or a date), else an exhausted `RateLimit`."""
    get = getattr(headers, "get", lambda name: None)
    asked = str(get("Retry-After") or "").strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        limit = _RATE_LIMIT.search(str(get("RateLimit") or ""))
        return float(limit[1]) if limit else None
