"""Parts of models that two systems share. A model is an ``nn.Module``: batch to named outputs.

May import ``data``, ``core`` and the layers below them. Read ``cluster_centres.py`` first.
"""
