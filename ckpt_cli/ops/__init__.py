"""Questions: one file a command. They return results and never print."""
