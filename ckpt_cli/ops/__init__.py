"""Questions: a file for each command, and what several of them need. They return results and never print."""
