"""safetensors files: a JSON header over one buffer."""
