"""`python -m diffedit` is the command line."""

from __future__ import annotations

from diffedit.cli import app

if __name__ == "__main__":
    app()
