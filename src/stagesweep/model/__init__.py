"""Models: each maps a batch to named outputs."""
