"""Removal of what dead pilots left behind."""
