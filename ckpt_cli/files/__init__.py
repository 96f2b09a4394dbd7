"""Bytes on disk: ranged reads, and the two safe ways of writing (a journaled patch, an atomic replacement).

Nothing here knows what a tensor is.
"""
