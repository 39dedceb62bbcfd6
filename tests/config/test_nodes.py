"""Nodes of a config are found at any depth."""

from stagesweep.config.nodes import target_names


def test_every_target_is_found_at_any_depth() -> None:
    nested = {"_target_": "a.B", "x": [{"_target_": "c.D", "y": {"_target_": "e.F"}}], "z": 1}
    assert target_names(nested) == {"a.B", "c.D", "e.F"}
