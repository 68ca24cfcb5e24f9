"""Serving a model: the stage runtime, and how a token is chosen."""
