"""What this job was given: CPUs, memory and time."""
