"""Formats of other libraries, which hold tensors as plain ranges of bytes."""
