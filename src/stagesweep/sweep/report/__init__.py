"""The presentation of a sweep, running or finished: tables, charts and ``report.html``.

Imports `sweep.study`, `metric`, `store` and the layers below them. Read `loading.py` first, then
`page.py`.
"""
