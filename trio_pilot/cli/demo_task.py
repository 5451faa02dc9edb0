"""The task of the demo: tell how well a wave from the middle of this pixel fits the times that the sensors saw.

It knows nothing of trio-pilot: it reads EWMS_TASK_INFILE, and writes EWMS_TASK_OUTFILE.
"""

import json
import math
import os
from pathlib import Path

LIGHT = 0.299792458  # metres per nanosecond


def main() -> None:
    """Compute chi-square, with the time at which the wave crosses the middle of the detector fitted."""
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
