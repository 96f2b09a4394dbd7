"""The command line: one file a command, and one boundary where errors become a line and an exit code."""
