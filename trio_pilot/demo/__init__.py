"""The demo: a small sky scan. `sky` makes its events, `pixel.py` is its task."""
