"""Files elsewhere: https, the Hugging Face hub and object stores, read by ranges and written by staging."""
