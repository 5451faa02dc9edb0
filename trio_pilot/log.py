"""Logging: one logger of ours, one level for everybody else's."""

import logging
import sys

LOGGER = logging.getLogger("trio_pilot")

FORMAT = "%(asctime)s %(levelname)s %(message)s"


def set_up(level: str, third_party_level: str) -> None:
    """Log to stderr: ours from `level` on, other libraries' from `third_party_level` on."""
    logging.basicConfig(stream=sys.stderr, format=FORMAT, level=third_party_level)
    LOGGER.setLevel(level)
    if logging.getLevelName(third_party_level) >= logging.WARNING:
        # pika logs a page for each lost connection; we say the same in a line.
        logging.getLogger("pika").setLevel(logging.CRITICAL)
