"""The subcommands: each a module with a function that does it, and gives the exit code."""
