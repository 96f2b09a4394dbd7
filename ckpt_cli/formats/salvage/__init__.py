"""Files that were cut short: the tensors whose bytes are all there, and what is lost."""
