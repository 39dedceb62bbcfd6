"""Runs the trials of a sweep: the controller, and the backends that execute its jobs.

It may import the report, the study and the search space, and everything below the sweep. Read
``controller.py`` first, then ``job.py`` and ``backends.py``.
"""
