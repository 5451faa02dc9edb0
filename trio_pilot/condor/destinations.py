"""Destinations of reports to HTCondor, by their names in the setting `htchirp_dest`.

JOB_ATTR writes each attribute to the queue of the access point at once. JOB_ATTR_DELAYED leaves it to the execution point,
which sends the latest values every few minutes with news of its own, and at the end of the job: that costs the access point
nothing, however many pilots there are, and needs no I/O proxy.
"""

JOB_ATTR, EVENT_LOG, DELAYED = "JOB_ATTR", "JOB_EVENT_LOG", "JOB_ATTR_DELAYED"

# Bytes of a quoted text. Of the event log 1023 bytes of a line are read, its name and header included, and the closing quote
# would be lost; the proxy takes lines of up to 5120 bytes, in which a space or backslash counts twice. It drops a delayed
# attribute of more than 993 bytes, or with a line break (seen with 23.9), and reports no error.
MOST_QUOTED = {JOB_ATTR: 2400, EVENT_LOG: 940, DELAYED: 993}

# By default the execution point reports every 5 minutes, and the access point notes that every 15 (STARTER_UPDATE_INTERVAL,
# SHADOW_QUEUE_UPDATE_INTERVAL).
LONGEST_DELAY = 1200  # seconds


def name_at(destination: str, name: str) -> str:
    """Return the name that an attribute has at a destination: HTCondor takes a delayed one only if it begins with Chirp."""
    return name.removeprefix("HT") if destination == DELAYED else name
