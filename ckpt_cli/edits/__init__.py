"""Edits: one file a command. A plan says what changes; the transaction carries it out, all or nothing."""
