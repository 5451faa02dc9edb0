"""Reports to HTCondor."""
