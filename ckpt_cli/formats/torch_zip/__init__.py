"""What `torch.save`, `torch.jit.save` and `torch.export.save` write: a zip file with pickles in it."""
