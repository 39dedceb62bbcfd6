"""Stub."""

from omegaconf import DictConfig


def validate(cfg: DictConfig) -> None:
    """Check."""
