"""Changes to a pickle's graph: locate entries, retarget tensors, rewrite."""
