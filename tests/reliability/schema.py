"""The JSON schema of the manifest, made from the code that reads it.

    python -m tests.reliability.schema           writes docs/assets/edit-1.0.schema.json
    python -m tests.reliability.schema --check   says whether the committed one is current

The schema describes the value under `manifest` in the metadata of `edit.safetensors`. A file that passes has the right
shape; only diffedit's reader also checks hashes, and that texts and numbers fit together.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from diffedit.io.manifest import FORMAT, FORMAT_VERSION, Manifest

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PATH = Path(__file__).parents[2] / "docs" / "assets" / f"edit-{FORMAT_VERSION}.schema.json"


def schema() -> dict[str, Any]:
    """The schema as a document.

    A saved manifest spells out every field, so all are required, whatever the constructor may leave out.
    """
    document: dict[str, Any] = Manifest.model_json_schema(mode="serialization")
    for part in (document, *document["$defs"].values()):
        part.pop("description", None)  # docstrings speak of Python
        if part.get("type") == "object" and "properties" in part:
            part["required"] = sorted(part["properties"])
            part["additionalProperties"] = False
    properties = document["properties"]
    properties["format"] = {"const": FORMAT}
    properties["format_version"] = {"const": FORMAT_VERSION}
    properties["edit_id"] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
    return {"$schema": DIALECT, "title": f"Manifest of a diffedit edit, format {FORMAT_VERSION}", **_plain(document)}


def text() -> str:
    """The file's content: sorted keys, so that equal schemas are equal texts."""
    return json.dumps(schema(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _plain(node: Any) -> Any:
    """Without the titles and defaults that pydantic adds to every field; names of fields are left alone."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _plain(item) for name, item in value.items()} if key in ("properties", "$defs") else _plain(value)
        for key, value in node.items()
        if key not in ("title", "default")
    }


def main() -> int:
    """The command line; returns the exit code."""
    if sys.argv[1:] == ["--check"]:
        return int(not PATH.is_file() or PATH.read_text(encoding="utf-8") != text())
    PATH.write_text(text(), encoding="utf-8")
    print(PATH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
