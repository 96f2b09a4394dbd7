"""Edits: a file for each command or more. A plan says what changes; the transaction carries it out, all or nothing."""
