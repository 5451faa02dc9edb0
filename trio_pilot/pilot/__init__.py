"""One pilot: from a delivery to a settled event."""
