"""The CPUs, memory and time that this job was given."""
