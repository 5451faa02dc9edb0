"""`python -m onefile`: trio-pilot as one executable file, for any of several Pythons, that needs nothing but one of them."""
