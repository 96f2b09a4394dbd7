"""Zip files as such: records, storages in records, and a writer that lays them out as torch does."""
