"""placeholder"""

from typing import Any


def model_card(gate: dict[str, Any] | None) -> str:
    return "# builtin:emoji (in training)\n"


def scorer_card(gate: dict[str, Any] | None) -> str:
    return "# builtin:emoji-scorer (in training)\n"
