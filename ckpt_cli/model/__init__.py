"""Facts about a checkpoint as frozen dataclasses: storages, tensors, values, changes, and a new checkpoint."""
