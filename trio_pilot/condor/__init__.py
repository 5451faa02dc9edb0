"""What HTCondor tells of the slot, and what it is told of the pilot. Nothing of it is needed outside HTCondor."""
