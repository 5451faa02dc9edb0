"""The data directory, and the files of each task."""
