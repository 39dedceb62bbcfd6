"""The presentation of a sweep, running or finished: tables, charts and ``report.html``.

Imports `sweep.study`, `metric.interval`, store and base. Read `loading.py` first, then `page.py`.
"""
