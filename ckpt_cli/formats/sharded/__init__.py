"""Sets of shards with an index, as the Hugging Face libraries write them."""
