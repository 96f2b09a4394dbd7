"""The public Python API: checkpoints as mappings, and the commands as functions."""
