"""The events of the demo: one for each pixel of the sky from which a simulated wave in a detector may have come.

A plane wave crosses the detector at the speed of light, and each sensor records its time. Each pixel of a HEALPix map of the
sky is a possible direction of the wave; the task of its event computes how well that direction fits the recorded times.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

NSIDE = 4  # HEALPix resolution: 12 NSIDE² pixels
PIXELS = 12 * NSIDE**2
WIDTH = math.degrees(math.sqrt(4 * math.pi / PIXELS))  # degrees; the width of a square with the area of a pixel

TRUTH = (1.13, 3.70)  # zenith and azimuth of the direction that the wave comes from; tasks do not know it
SENSORS = 60
SIZE = 500.0  # metres from the middle of the detector to its edge
TIME_ERROR = 40.0  # nanoseconds
LIGHT = 0.299792458  # metres per nanosecond


def pix2ang(nside: int, pixel: int) -> tuple[float, float]:
    """Return zenith and azimuth of the centre of a pixel, in HEALPix's ring scheme (Górski et al. 2005, section 4.1)."""
    polar, pixels = 2 * nside * (nside - 1), 12 * nside**2
    if polar <= pixel < pixels - polar:  # the belt: rings of 4 nside pixels, every other one shifted by half a pixel
        ring, place = divmod(pixel - polar, 4 * nside)
        z = (4 * nside - 2 * (ring + nside)) / (3 * nside)
        return math.acos(z), (place + (0.5 if ring % 2 == 0 else 0.0)) * math.pi / (2 * nside)
    from_pole = min(pixel, pixels - 1 - pixel)  # a cap: ring i from its pole has 4 i pixels
    ring = (1 + math.isqrt(1 + 2 * from_pole)) // 2
    place = from_pole - 2 * ring * (ring - 1)
    z, azimuth = 1 - ring**2 / (3 * nside**2), (place + 0.5) * math.pi / (2 * ring)
    return (math.acos(z), azimuth) if pixel < polar else (math.acos(-z), 2 * math.pi - azimuth)


def events() -> Iterator[dict[str, Any]]:
    """Yield an event for each pixel: its direction, and the times that the sensors recorded."""
    hits = _hits()
    for pixel in range(PIXELS):
        zenith, azimuth = pix2ang(NSIDE, pixel)
        yield {"pixel": pixel, "zenith": zenith, "azimuth": azimuth, "hits": hits, "time_error": TIME_ERROR}


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the angle between two directions, in degrees."""
    cosine = sum(a * b for a, b in zip(_vector(*one), _vector(*other), strict=True))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def _hits() -> list[list[float]]:
    """Return x, y and z (metres) of each sensor, and the simulated time (nanoseconds) of the wave there."""
    chance, source = random.Random(4), _vector(*TRUTH)  # noqa: S311 -- the same event each time
    hits = []
    for _ in range(SENSORS):
        place = [chance.uniform(-SIZE, SIZE) for _ in range(3)]
        time = -sum(a * b for a, b in zip(place, source, strict=True)) / LIGHT
        hits.append([round(number, 1) for number in (*place, chance.gauss(time, TIME_ERROR))])
    return hits


def _vector(zenith: float, azimuth: float) -> tuple[float, float, float]:
    across = math.sin(zenith)
    return across * math.cos(azimuth), across * math.sin(azimuth), math.cos(zenith)
