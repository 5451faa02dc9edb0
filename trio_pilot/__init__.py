"""A job pilot on structured concurrency: one container per event, and never one left behind."""

__version__ = "0.1.0"
