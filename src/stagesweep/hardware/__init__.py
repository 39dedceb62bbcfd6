"""What a run uses of this machine."""
