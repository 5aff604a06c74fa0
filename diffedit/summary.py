"""An edit in a few lines for a person, from its manifest alone."""

from __future__ import annotations

from diffedit.aliases import other_names
from diffedit.io.manifest import Manifest


def summary(manifest: Manifest) -> str:
    """What became what and why, other names and where they come from, and per site where and how large."""
    lines = []
    for request, reason in zip(manifest.requests, manifest.target_reasons, strict=True):
        lines.append(f"{request.action} {request.subject!r} -> {request.target!r} ({reason})")
        if request.aliases:
            lines.append(f"  and {other_names(request)}")
    for site in manifest.sites:
        kept = "not applied yet" if site.achieved is None else f"{site.achieved:.1%} of the change kept in {site.dtype}"
        size = f"rank {site.rank}, relative norm {site.relative_norm:.3f}"
        lines.append(f"  {site.component}.{site.path}: {size}, {kept}")
    return "\n".join(lines)
