"""Look into and edit PyTorch checkpoints without loading or running them."""
