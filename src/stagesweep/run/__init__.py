"""Executes one composed config: plan, stage after stage, result.

May import everything below it: the parts of an experiment, core, parallel, hardware, store,
config and base. Read execute.py first, then runner.py, and context.py for what a stage may use.
"""
