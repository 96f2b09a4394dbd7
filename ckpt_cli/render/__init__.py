"""Results as text: tables, tab-separated rows, JSON, tensors as torch prints them. Nothing here prints."""
