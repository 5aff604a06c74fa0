"""An edit as a JSON document and as tables: what it does, where, how much, why, and for which base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from diffedit.edit import Edit
    from diffedit.request import Request
    from diffedit.tradeoff import TradeOffCurve

_SHORT_HASH = 12


def edit_payload(edit: Edit) -> dict[str, Any]:
    """The JSON document of an edit."""
    manifest = edit.manifest
    requests = [
        request_payload(request, reason)
        for request, reason in zip(manifest.requests, manifest.target_reasons, strict=True)
    ]
    norms = {site: change.norm() for site, change in edit.delta}
    sites = [
        {
            "name": record.site.name,
            "layer": record.layer,
            "role": record.role.value,
            "shape": [record.d_out, record.d_in],
            "rank": record.rank,
            "norm": norms[record.site],
            "relative_norm": record.relative_norm,
            "achieved": record.achieved,
            "dtype": record.dtype,
            "base_sha256": record.base_sha256,
            "result_sha256": record.result_sha256,
            "diagnostics": record.diagnostics,
        }
        for record in manifest.sites
    ]
    return {
        "id": manifest.edit_id,
        "format_version": manifest.format_version,
        "requests": requests,
        "tokens": manifest.tokens.value,
        "locator": manifest.locator.model_dump(mode="json"),
        "updater": manifest.updater.model_dump(mode="json"),
        "sites": sites,
        "bytes": edit.delta.nbytes,
        "base": manifest.base.model_dump(mode="json"),
        "versions": manifest.versions,
    }


def curve_payload(curve: TradeOffCurve) -> dict[str, Any]:
    """The JSON document of one site's trade-off."""
    return {"site": curve.site.name, "chosen": vars(curve.chosen), "points": [vars(point) for point in curve.points]}


def request_payload(request: Request, target_reason: str) -> dict[str, Any]:
    """A request as a JSON document, with why that target and where each other name comes from."""
    from diffedit.aliases import reasons

    why = {alias.name: alias.reason for alias in reasons(request)}
    return {**request.model_dump(mode="json"), "target_reason": target_reason, "alias_reasons": why}


def print_requests(console: Console, edit: dict[str, Any]) -> None:
    """Per concept: what, into what, and why; below it, its other names."""
    for request in edit["requests"]:
        console.print(
            f"[bold]{request['action']}[/] {request['kind']} [bold red]{escape(request['subject'])}[/] "
            f"-> [bold green]{escape(str(request['target']))}[/]  [dim]({escape(request['target_reason'])})[/]"
        )
        if request["aliases"]:
            names = (f"{alias} [dim]({why})[/]" for alias, why in _escaped(request["alias_reasons"]))
            console.print(f"  and {', '.join(names)}")


def print_sites(console: Console, edit: dict[str, Any]) -> None:
    """The table of edited layers."""
    table = Table("edit site", "shape", "rank", "norm", "relative", "residual", "condition", "kept after rounding")
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].overflow = "fold"
    for site in edit["sites"]:
        diagnostics = site["diagnostics"] or {}
        table.add_row(
            site["name"],
            f"{site['shape'][0]} x {site['shape'][1]}",
            str(site["rank"]),
            f"{site['norm']:.4g}",
            f"{site['relative_norm']:.2%}",
            _number(diagnostics.get("residual"), ".2%"),
            _number(diagnostics.get("condition"), ".1e"),
            "not applied yet" if site["achieved"] is None else f"{site['achieved']:.2%} ({site['dtype']})",
        )
    console.print(table)


def print_provenance(console: Console, edit: dict[str, Any]) -> None:
    """Method, base and identity, one per line."""
    base = edit["base"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    rows = [
        ("updater", _plugin(edit["updater"])),
        ("locator", f"{_plugin(edit['locator'])}, tokens: {edit['tokens']}"),
        ("base", f"{base['source']}{revision} ({base['backend']})"),
        ("fingerprints", ", ".join(f"{key} {value[:_SHORT_HASH]}" for key, value in base["fingerprints"].items())),
        ("made with", ", ".join(f"{key} {value}" for key, value in edit["versions"].items())),
        ("edit id", edit["id"]),
    ]
    for request in edit["requests"]:
        if request["preserve"]:
            rows.insert(0, ("preserve", f"{', '.join(request['preserve'])} (for {request['subject']})"))
    print_rows(console, rows)


def print_rows(console: Console, rows: list[tuple[str, str]]) -> None:
    """Two columns without lines: a dim name and its value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table)


def _escaped(texts: dict[str, str]) -> list[tuple[str, str]]:
    return [(escape(name), escape(text)) for name, text in texts.items()]


def _plugin(record: dict[str, Any]) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in record["settings"].items())
    return f"{record['name']}({settings}), {record['reference']}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
