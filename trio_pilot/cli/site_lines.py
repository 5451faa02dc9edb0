"""Lines for the stdout of a job that tell where it runs: EWMS looks for the sites of failed jobs there."""

import os
from collections.abc import Iterator, Mapping

from trio_pilot.allocation import classad
from trio_pilot.allocation.resources import JOB_AD, MACHINE_AD, SCRATCH

# Variables that name a site, and nothing that is secret: of the environment, else of the machine's ad.
NAMES = (
    "GLIDEIN_Site",
    "GLIDEIN_ResourceName",
    "GLIDEIN_Entry_Name",
    "GLIDEIN_Name",
    "GLIDEIN_Factory",
    "OSG_SITE_NAME",
)


def site_lines(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the names of the site as `env` would print them, and that of the host; nothing outside of a job."""
    ad = classad.read(environ.get(MACHINE_AD))
    found = {name: environ.get(name) or ad.get(name.lower()) for name in NAMES}
    known = [f"{name}={' '.join(str(value).split())}" for name, value in found.items() if value]
    if known or any(name in environ for name in (JOB_AD, MACHINE_AD, SCRATCH)):
        yield from known
        yield f"HOST={os.uname().nodename}"
