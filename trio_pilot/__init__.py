"""A job pilot on structured concurrency: one container for each event, and none left behind."""

__version__ = "0.1.0"
