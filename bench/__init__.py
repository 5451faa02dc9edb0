"""Measurements of what the pilot costs. Run them with `python -m bench`; nothing here is a test."""
