"""Modules: the tree of a checkpoint, inferred layers, and what `print(net)` says of them."""
