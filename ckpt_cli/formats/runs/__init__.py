"""Folders of training runs: the model, the optimizer and everything else that a trainer saved, as one checkpoint."""
