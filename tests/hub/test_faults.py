"""The fault matrix, over real sockets: refusals, failures and broken connections at every step of a push and a pull.

Proves three things of each: nothing is committed twice, nothing waits past its deadline, and what comes out is one of
our errors that says cause and next step, with no byte of the token (this server repeats the token in its errors; the
watch over prints and logs is in conftest).
"""

from __future__ import annotations

import copy
import pickle
import time
import traceback

import pytest

from diffedit import DiffEditError, Edit
from diffedit.errors import (
    HubAccessError,
    HubConflictError,
    HubNotFoundError,
    HubRefusedError,
    HubUnavailableError,
    IntegrityError,
)
from diffedit.io import hub_errors
from tests.hub.conftest import TOKEN
from tests.hub.server import wait_until

REFUSALS = {
    400: HubRefusedError,
    401: HubAccessError,
    403: HubAccessError,
    404: HubNotFoundError,
    409: HubConflictError,
    412: HubConflictError,
    413: HubRefusedError,
    422: HubRefusedError,
}
FAILURES = (408, 429, 500, 502, 503, 504, "reset")  # over at once, and worth another try
STALLS = ("stall", "drip")  # end only when the client loses patience
SPOILT = ("lost", "half", "garbled", "mute")  # the work is done, the reply is not what it should be
SLACK = 0.5


def failure_of(call, deadline: float, kind: type[DiffEditError]) -> DiffEditError:
    """The error of a call that must fail in time, checked for what every error of ours must be."""
    start = time.monotonic()
    with pytest.raises(DiffEditError) as caught:
        call(deadline=deadline)
    assert time.monotonic() - start < deadline + SLACK
    error = caught.value
    assert type(error) is kind
    assert error.value and error.cause and error.hint
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error)) + str(error)
    assert TOKEN not in shown and "httpx" not in shown.replace("diffedit", "")
    chain, seen = [error], []
    while chain:  # nothing of the library, whose requests hold the token, hangs on to the error
        one = chain.pop()
        seen.append(one)
        chain += [other for other in (one.__cause__, one.__context__) if other is not None]
    assert all(isinstance(one, DiffEditError) for one in seen)
    assert str(pickle.loads(pickle.dumps(copy.copy(error)))) == str(error)
    return error


# push


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_refused_commit_is_sent_once(server, name, push, fault):
    server.make(name)
    server.fail(name, "commit", fault)
    failure_of(push, 5, REFUSALS[fault])
    assert server.count(name)["commit"] == 1 and server.repos[name].log() == []


@pytest.mark.parametrize("fault", FAILURES)
def test_a_failing_commit_is_tried_four_times_and_never_lands_twice(server, name, push, fault):
    server.make(name)
    server.fail(name, "commit", fault)
    failure_of(push, 5, HubUnavailableError)
    assert server.count(name)["commit"] == 4 and server.repos[name].log() == []
    if fault != 429:  # a rate limit is a clear no; after all else the repository is looked at before another try
        assert server.count(name)["info"] == 1 + 4


@pytest.mark.parametrize(
    ("route", "fault"),
    [
        *((route, fault) for route in ("create", "info", "commit") for fault in FAILURES),
        ("preupload", 503),  # huggingface_hub's own retry, which takes a second
    ],
)
def test_one_failure_anywhere_is_overcome(server, name, push, route, fault):
    server.fail(name, route, fault, times=1)
    pushed = push()
    assert pushed.created and [commit.oid for commit in server.repos[name].log()] == [pushed.commit]


@pytest.mark.parametrize("fault", SPOILT)
def test_a_commit_whose_reply_is_lost_is_not_repeated(server, name, push, fault):
    server.make(name)
    server.fail(name, "commit", fault)
    start, deadline = time.monotonic(), 2.5 if fault == "mute" else 10
    pushed = push(deadline=deadline)
    assert time.monotonic() - start < deadline
    assert pushed.created and [commit.oid for commit in server.repos[name].log()] == [pushed.commit]
    assert server.count(name)["commit"] == 1


@pytest.mark.parametrize("fault", ["lost", "half", "garbled"])
@pytest.mark.parametrize("route", ["create", "info", "branch"])
def test_a_lost_reply_before_the_commit_is_asked_for_again(server, name, push, route, fault):
    server.fail(name, route, fault, times=1)
    pushed = push(revision="v1")
    assert server.repos[name].private and [c.oid for c in server.repos[name].log("v1")] == [pushed.commit]


@pytest.mark.parametrize("fault", STALLS)
@pytest.mark.parametrize("route", ["create", "info", "preupload", "commit"])
def test_a_stall_ends_at_the_deadline(server, name, push, route, fault):
    if route != "create":
        server.make(name)
    server.fail(name, route, fault)
    failure_of(push, 0.5, HubUnavailableError)
    assert name not in server.repos or server.repos[name].log() == []


def test_when_nothing_is_known_the_error_says_so(server, name, push):
    """The commit lands, its reply is lost, and then the Hub is gone: whether it landed cannot be known."""
    server.make(name)
    server.fail(name, "commit", "lost")
    server.fail(name, "info", 503, after=1)
    error = failure_of(push, 5, HubUnavailableError)
    assert "not known" in error.cause and "not sent twice" in error.hint
    server.faults.clear()
    assert push().created is False and len(server.repos[name].log()) == 1


def test_a_call_that_was_given_up_commits_nothing_later(server, name, push):
    """huggingface_hub waits as long as a server asks it to and goes on, long after the push has failed."""
    server.make(name)
    server.fail(name, "preupload", (503, {"Retry-After": "0"}))  # it waits a second more than asked
    failure_of(push, 0.6, HubUnavailableError)
    waiting = server.count(name)["preupload"]
    server.faults.clear()
    assert waiting and wait_until(lambda: server.count(name)["preupload"] == 2 * waiting)
    time.sleep(0.2)
    assert server.count(name)["commit"] == 0 and server.repos[name].log() == []


@pytest.mark.parametrize("header", [{"Retry-After": "1"}, {"RateLimit": '"api";r=0;t=1'}])
def test_the_wait_that_the_hub_asks_for_is_kept(server, name, push, header):
    server.make(name)
    server.fail(name, "commit", (429, header), times=1)
    start = time.monotonic()
    assert push().created
    assert time.monotonic() - start >= 1.0 and server.count(name)["commit"] == 2


def test_a_wait_beyond_the_deadline_is_not_begun(server, name, push):
    server.make(name)
    server.fail(name, "commit", (429, {"Retry-After": "3600"}))
    start = time.monotonic()
    error = failure_of(push, 20, HubUnavailableError)
    assert time.monotonic() - start < 2 and "3600 seconds" in error.hint


@pytest.mark.parametrize("fault", SPOILT)
def test_a_pull_request_whose_reply_is_lost_is_not_opened_again(server, name, repo, push, fault):
    repo.add({"README.md": b"changed"})
    server.fail(name, "commit", fault)
    pushed = push(create_pr=True, deadline=2.5 if fault == "mute" else 10)
    assert len(repo.requests) == 1 and pushed.pull_request and pushed.commit == repo.refs["refs/pr/1"]


@pytest.mark.parametrize(("fault", "sent"), [(429, 4), (500, 1), ("reset", 1), ("stall", 1)])
def test_a_pull_request_is_only_tried_again_after_a_clear_no(server, name, repo, push, fault, sent):
    """A second commit on the same parent is refused by the Hub; a second pull request is not."""
    repo.add({"README.md": b"changed"})
    server.fail(name, "commit", fault)
    seconds = 2 if fault == "stall" else 10
    error = failure_of(lambda deadline: push(create_pr=True, deadline=deadline), seconds, HubUnavailableError)
    assert server.count(name)["commit"] == sent and repo.requests == []
    assert fault == 429 or "not known" in error.cause


# pull


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_refused_pull_is_asked_once(server, name, repo, pull, fault):
    server.fail(name, "info", fault)
    failure_of(pull, 5, REFUSALS[fault])
    assert server.count(name) == {"info": 1}


@pytest.mark.parametrize("fault", [*FAILURES, "lost", "half", "garbled"])
def test_a_failing_pull_is_tried_four_times(server, name, repo, pull, fault):
    server.fail(name, "info", fault)
    failure_of(pull, 5, HubUnavailableError)
    assert server.count(name) == {"info": 4}


@pytest.mark.parametrize("fault", [*FAILURES, "lost", "half", "garbled"])
def test_one_failure_is_overcome(server, name, repo, pull, edit, fault):
    server.fail(name, "info", fault, times=1)
    assert Edit.load(pull().folder).files() == edit.files()


@pytest.mark.parametrize("fault", STALLS)
def test_a_stalled_pull_ends_at_the_deadline(server, name, repo, pull, fault):
    server.fail(name, "info", fault)
    failure_of(pull, 0.4, HubUnavailableError)


@pytest.mark.parametrize("fault", [*REFUSALS, *FAILURES, *STALLS, *SPOILT])
def test_a_download_that_fails_for_good_ends_in_time(server, name, repo, pull, tmp_path, fault):
    kind = IntegrityError if fault == "garbled" else REFUSALS.get(fault, HubUnavailableError)
    server.fail(name, "file", fault)
    failure_of(pull, 0.4 if fault in (*STALLS, "mute") else 5, kind)
    assert server.count(name)["file"] <= 4
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("fault", [*FAILURES, "half", "lost", "garbled"])
def test_one_broken_download_is_overcome(server, name, repo, pull, edit, fault):
    """`half` sends some wrong bytes and breaks off, `garbled` sends a page of its own: only the hash tells."""
    server.fail(name, "file", fault, times=1)
    assert Edit.load(pull().folder).files() == edit.files()


# the words


class Reply:
    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.status_code, self.headers = status, headers or {}


class Error(Exception):
    def __init__(self, status: int, said: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(said)
        self.response, self.server_message = Reply(status, headers), said


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, None, "hf auth login"),
        (403, None, "write permission"),
        (403, "GatedRepo", "ask for access"),
        (404, "RepoNotFound", "needs a token"),
        (404, "RevisionNotFound", "no such revision"),
        (404, "EntryNotFound", "holds no edit"),
        (409, None, "latest commit"),
        (412, None, "latest commit"),
        (413, None, "too large"),
        (422, None, "refuses"),
        (429, None, "slow down"),
        (503, None, "not sent twice"),
        (599, None, "unknown status"),
    ],
)
def test_each_status_says_what_to_do(status, code, words):
    failure = hub_errors.explain(Error(status, headers={"X-Error-Code": code} if code else {}), "me/edit")
    assert words in str(failure.error).lower() and f"me/edit, {status}" in str(failure.error)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer <hidden>"),
        ("see hf_abcdefghijKLMN", "see <hidden>"),
        ("http://user:pass@host/x", "http://<hidden>@host/x"),
        ("/x?access_token=abc&y=1", "/x?access_token=<hidden>&y=1"),
        ("own-secret-text", "<hidden>-text"),
        ("\x1b[31mred\x07\nnext", "[31mred next"),
        ("x" * 1000, "x" * 237 + "..."),
        ("nothing here, shf_not", "nothing here, shf_not"),
    ],
)
def test_redaction(text, shown):
    assert hub_errors.redact(text, ["own-secret"]) == shown


@pytest.mark.parametrize(
    ("asked", "seconds"), [("7", 7.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", None), ("", None)]
)
def test_retry_after(asked, seconds):
    assert hub_errors.explain(Error(503, headers={"Retry-After": asked}), "me/edit").wait == seconds
