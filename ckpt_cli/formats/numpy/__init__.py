"""numpy's `.npy` and `.npz`."""
