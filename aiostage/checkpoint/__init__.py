"""State dicts to disk and back."""
