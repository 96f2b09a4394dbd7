"""Folders of `torch.distributed.checkpoint`: tensors in chunks, read, joined and written."""
