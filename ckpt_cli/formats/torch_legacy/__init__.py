"""Files of `torch.save` from before 1.6: streams of pickles, and tar files."""
