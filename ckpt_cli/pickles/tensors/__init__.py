"""The calls by which a pickle rebuilds tensors, read and made."""
