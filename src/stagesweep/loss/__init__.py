"""Loss terms: each maps outputs and a batch to a sum and what it is a sum over."""
