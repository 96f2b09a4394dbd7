"""Jobs over ranges of bytes, run on an executor, with results in order."""
