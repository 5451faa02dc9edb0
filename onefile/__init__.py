"""`python -m onefile`: make trio-pilot one executable file, for several Pythons; to run it, one of them is enough."""
