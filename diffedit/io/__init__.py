"""Edits on disk: the portable file, adapters for stock loaders, the model card, the folder that holds them."""
