"""Pickles as graphs of inert nodes: read, walked and named without running anything."""
