"""Folders of rank files: what each process of a training saved of the model, put together as the model."""
