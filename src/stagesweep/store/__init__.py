"""The store: finished stages on disk, by the fingerprint of all their inputs.

May import config and base only. Read store.py first, then fingerprint.py and stage_inputs.py;
command.py is ``stagesweep-store``.
"""
