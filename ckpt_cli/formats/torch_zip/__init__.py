"""Zip files of `torch.save`, `torch.jit.save` and `torch.export.save`, with pickles in them."""
