"""`diffedit list`: the backends, locators and updaters that are installed, third-party ones too."""

from __future__ import annotations

from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffedit.cli import options
from diffedit.cli.settings import describe
from diffedit.cli.shell import Result, working
from diffedit.errors import DiffEditError

_KINDS: tuple[Literal["backends", "locators", "updaters"], ...] = ("backends", "locators", "updaters")


def list_plugins(json: options.Json = False, debug: options.Debug = False) -> Result:
    """List backends, locators and updaters with their reference and settings."""
    with working("Looking for plugins"):
        from diffedit import registry

        found: dict[str, list[dict[str, Any]]] = {
            kind: [_record(registry, kind, name) for name in registry.names(kind)] for kind in _KINDS
        }

    def render(console: Console) -> None:
        for kind, records in found.items():
            table = Table(title=kind, title_justify="left", title_style="bold")
            table.add_column("name", no_wrap=True)
            table.add_column("reference")
            if kind != "backends":
                table.add_column("settings (--set KEY=VALUE)")
            for record in records:
                cells = [record["name"], record["error"] or record["reference"]]
                if kind != "backends":
                    cells.append("\n".join(_setting(item) for item in record["settings"]) or "none")
                table.add_row(*map(escape, cells))
            console.print(table)

    return Result({"command": "list", **found}, render)


def _record(registry: Any, kind: str, name: str) -> dict[str, Any]:
    """One plugin; a broken third-party one is listed with its error and does not hide the others."""
    package = {
        "name": name,
        "built_in": name in registry.BUILT_IN[kind],
        "reference": None,
        "settings": [],
        "error": None,
    }
    try:
        plugin = registry.get(kind, name)
    except (DiffEditError, ImportError, AttributeError) as error:
        return {**package, "error": f"cannot be loaded: {error}"}
    return {**package, "reference": plugin.reference, "settings": describe(plugin)}


def _setting(item: dict[str, Any]) -> str:
    line = f"{item['name']}={item['default']}"
    return f"{line}  {item['description']}" if item["description"] else line
