"""What every command shares: one result in, one document out, one exit code.

A command is a function that returns a `Result`. The group below runs it, prints the result on stdout (as text, or with
`--json` as exactly one JSON document), and turns errors into messages: a `DiffEditError` keeps its code and exit code,
a usage error is 2, anything else is 1, an interrupt is 130. A traceback appears only with `--debug`. Progress goes to
stderr.

Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from diffedit.errors import DiffEditError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
_WIDTH_WITHOUT_TERMINAL = 120
_QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Result:
    """What a command found out.

    Attributes:
        payload: the JSON document.
        render: prints the same for people.
        exit_code: of the program; not 0 if the answer itself is bad news (a check that failed).
    """

    payload: dict[str, Any]
    render: Callable[[Console], None]
    exit_code: int = 0


class Group(TyperGroup):
    """The command group with the rules above; `diffedit.cli.app` is built on it."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; exits with its code, or returns it when `standalone_mode` is off."""
        given = list(sys.argv[1:] if args is None else args) or ["--help"]
        flags = given[: given.index("--")] if "--" in given else given
        as_json, debug = "--json" in flags, "--debug" in flags
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        try:
            code = self._run(given, as_json, debug, {**extra, "complete_var": complete_var})
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of a pipe left; there is nobody to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = EXIT_FAILED
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, args: list[str], as_json: bool, debug: bool, extra: dict[str, Any]) -> int:
        try:
            with _library_warnings(shown=debug):
                outcome = super().main(args, prog_name="diffedit", standalone_mode=False, **extra)
            return _report(outcome, as_json)
        except BrokenPipeError:
            raise
        except Exception as error:
            if debug:
                Console(stderr=True).print_exception(show_locals=False)
            document, code = describe_error(error)
            _print_error(document, as_json)
            return code


def describe_error(error: BaseException) -> tuple[dict[str, Any], int]:
    """The JSON document and the exit code of an error."""
    if isinstance(error, DiffEditError):
        parts = {key: None if part is None else str(part) for key, part in vars(error).items()}
        body = {"code": error.code, "type": type(error).__name__, "message": str(error), **parts}
        return {"error": body}, error.exit_code
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return {"error": {"code": "INTERRUPTED", "message": "interrupted"}}, EXIT_INTERRUPTED
    explain = getattr(error, "format_message", None)  # the usage errors of click, whichever copy of it typer carries
    if explain is not None:
        usage = getattr(getattr(error, "ctx", None), "command_path", None)
        hint = f"Run {usage or 'diffedit'} --help"
        return {"error": {"code": "USAGE", "message": explain().rstrip("."), "hint": hint}}, EXIT_USAGE
    message = f"unexpected {type(error).__name__}: {error}"
    hint = "Run again with --debug for the traceback"
    return {"error": {"code": "INTERNAL", "message": message, "hint": hint}}, EXIT_FAILED


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes time; silent when stderr is not a terminal.

    Whatever a library prints meanwhile goes to stderr too, so that stdout holds the result alone.
    """
    with Console(stderr=True).status(escape(what) + " ..."), contextlib.redirect_stdout(sys.stderr):
        yield


def output_console() -> Console:
    """A console on stdout that does not squeeze tables when nobody watches."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False)


def to_json(payload: dict[str, Any]) -> str:
    """`payload` as indented ASCII JSON; numbers that JSON has no word for become null."""
    return json.dumps(_finite(payload), indent=2, allow_nan=False)


def _report(outcome: Any, as_json: bool) -> int:
    if outcome == EXIT_INTERRUPTED:
        document, code = describe_error(KeyboardInterrupt())
        _print_error(document, as_json)
        return code
    if isinstance(outcome, int):
        return outcome
    if isinstance(outcome, Result):
        if as_json:
            sys.stdout.write(to_json(outcome.payload) + "\n")
        else:
            outcome.render(output_console())
        return outcome.exit_code
    return 0


def _print_error(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(to_json(document) + "\n")
        return
    error = document["error"]
    case = error.get("case", error["message"])
    first = case if error.get("value") is None else f"{case}: {error['value']}"
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]Error[/] [bold]{error['code']}[/]  {escape(first)}")
    for part in ("cause", "hint"):
        if error.get(part):
            text = str(error[part]).rstrip(".")
            console.print(f"  {escape(text[:1].upper() + text[1:])}.")


@contextlib.contextmanager
def _library_warnings(shown: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        if not shown:
            warnings.simplefilter("ignore")
        yield


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
