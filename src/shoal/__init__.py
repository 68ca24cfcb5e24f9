"""Shoal: one computer out of many mixed, distant, mortal GPUs."""

__version__ = "0.1.0"
