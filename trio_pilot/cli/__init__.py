"""The command line: one module for each subcommand, with a function that runs it and returns the exit code."""
