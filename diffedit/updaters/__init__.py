"""What to write at the located sites."""
