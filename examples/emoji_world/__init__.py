"""Train `builtin:emoji` and its scorer from freely licensed emoji drawings (see README.md)."""
