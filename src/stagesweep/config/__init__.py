"""The config of a run: its schemas, their checks, and messages about its errors.

Imports torch only to check a config that names it. May import base only. Read schema.py first,
then validation.py.
"""
