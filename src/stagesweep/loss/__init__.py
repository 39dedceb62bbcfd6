"""Loss terms that know no domain. A term returns a sum over samples and the number of samples.

May import ``data``, ``core`` and the layers below them, and no stage. Read ``reconstruction.py``
first: it is a plain term; ``supervised_contrastive.py`` needs the whole batch, and
``deep_embedded_clustering.py`` the whole training set.
"""
