"""The journal beside a file that is edited in place: written, applied and recovered."""
