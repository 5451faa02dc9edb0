"""Places in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
WIRE_SAMPLES = ROOT / "tests/wire"  # message bodies that the real client made
