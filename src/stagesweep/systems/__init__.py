"""One package per system: its data, models, losses, stages and figures.

A system may import the shared parts and every layer below them, never another system; nothing
imports a system, whose classes configs name by ``_target_``. Inside a system the files are called
``data``, ``simulate``, ``model``, ``loss``, ``stage``, ``metric`` and ``figures``; a large one is a
folder of that name. Read ``audiogram`` first.
"""
