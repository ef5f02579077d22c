"""Files on disk: parts and their digests, the safetensors format, manifests, and directories that appear whole."""
