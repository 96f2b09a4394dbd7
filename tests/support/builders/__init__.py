"""Tiny checkpoints built byte by byte, without torch: sound ones, odd ones and hostile ones."""
