"""Measurements of the cost of the pilot. Run them with `python -m bench`; none of them is a test."""
