"""Calls to the Hub that end: every one runs under a total deadline, and what can be repeated is, at most four times.

huggingface_hub retries up- and downloads without limit of time, its client waits for a reply for ever, and the commit
itself is not retried at all. A call therefore runs in a thread of its own, and whoever asked waits for that thread only
so long. A thread cannot be stopped: one that was given up ends when its socket does, and the event
`given_up` tells it not to start anything new.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from diffedit.io.hub_errors import Failure, explain, timed_out

logger = logging.getLogger("diffedit")

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        deadline: seconds that a whole push or pull may take.
        tries: how often one step is tried.
        pause: seconds before the second try; doubled each time. A longer wait that the Hub asks for is kept instead.
    """

    deadline: float = 120.0
    tries: int = 4
    pause: float = 1.0


class Calls:
    """The calls of one push or pull.

    Args:
        repo_id: what they are about.
        patience: how long to try.
        secrets: texts that no message may show.
    """

    def __init__(self, repo_id: str, patience: Patience, secrets: Iterable[str] = ()) -> None:
        self.repo_id = repo_id
        self.patience = patience
        self.secrets = [secret for secret in secrets if secret]
        self._end = time.monotonic() + patience.deadline

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._end - time.monotonic())

    def once(
        self, call: Callable[[], T], *, share: float = 1.0, given_up: threading.Event | None = None
    ) -> T | Failure:
        """The call's result, or why there is none.

        Args:
            call: what to run; it may raise anything.
            share: part of the remaining time that it may take.
            given_up: set when nobody waits for the call any more.
        """
        seconds = self.remaining * share
        if seconds <= 0:
            return timed_out(self.repo_id, self.patience.deadline)
        outcome: queue.SimpleQueue[T | Failure] = queue.SimpleQueue()

        def work() -> None:
            try:
                outcome.put(call())
            except Exception as error:  # explained here, so that no traceback with the library's frames gets out
                outcome.put(explain(error, self.repo_id, self.secrets))

        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(work,), name="diffedit-hub", daemon=True).start()
        answered = False
        try:
            result = outcome.get(timeout=seconds)
            answered = True
            return result
        except queue.Empty:
            return timed_out(self.repo_id, seconds)
        finally:  # also on Ctrl-C
            if not answered and given_up is not None:
                given_up.set()

    def patiently(self, call: Callable[[], T], *, share: float = 0.5) -> T:
        """The result of a call that may be repeated without harm.

        Args:
            call: what to run; it may raise anything.
            share: part of the remaining time for each try. A half leaves time for another after one that stalls.

        Raises:
            HubError: it failed for good, or the deadline is near.
        """
        number = 0
        while True:
            outcome = self.once(call, share=share)
            if not isinstance(outcome, Failure):
                return outcome
            self.rest(number, outcome)
            number += 1

    def rest(self, number: int, failure: Failure) -> None:
        """Wait before the next try.

        Args:
            number: of the try that failed, from 0.
            failure: what it ended in.

        Raises:
            HubError: there is to be no next try.
        """
        wait = failure.wait if failure.wait is not None else self.patience.pause * 2**number
        if not failure.retry or number + 1 >= self.patience.tries or wait >= self.remaining:
            raise failure.error
        logger.info("%s; trying again in %.1f seconds", failure.error.case, wait)
        time.sleep(wait)
