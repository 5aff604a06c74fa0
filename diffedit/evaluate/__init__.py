"""Judging an edit by its pictures."""
