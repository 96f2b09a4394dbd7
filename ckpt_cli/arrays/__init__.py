"""Bytes and values: indexing, decoding and encoding. The only room that imports numpy, ml_dtypes or torch."""
