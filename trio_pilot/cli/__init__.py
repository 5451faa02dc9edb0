"""The command line: one module for each subcommand, with a function that does it and returns the exit code."""
