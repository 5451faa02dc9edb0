"""Child processes, their identity, and control groups."""
