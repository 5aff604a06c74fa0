"""Where to edit."""
