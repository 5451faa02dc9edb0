"""The task of the demo: compute how well a wave from the centre of a pixel fits the times that the sensors recorded.

It does not import trio-pilot: it reads the file EWMS_TASK_INFILE, and writes the file EWMS_TASK_OUTFILE.
"""

import json
import math
import os
from pathlib import Path

LIGHT = 0.299792458  # metres per nanosecond


def main() -> None:
    """Compute chi-square for the best time at which the wave may cross the middle of the detector."""
    event = json.loads(Path(os.environ["EWMS_TASK_INFILE"]).read_text())
    across = math.sin(event["zenith"])
    nx, ny, nz = across * math.cos(event["azimuth"]), across * math.sin(event["azimuth"]), math.cos(event["zenith"])
    late = [time + (x * nx + y * ny + z * nz) / LIGHT for x, y, z, time in event["hits"]]
    start = sum(late) / len(late)
    chi2 = sum((one - start) ** 2 for one in late) / event["time_error"] ** 2
    result = {"pixel": event["pixel"], "chi2": chi2}
    Path(os.environ["EWMS_TASK_OUTFILE"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
