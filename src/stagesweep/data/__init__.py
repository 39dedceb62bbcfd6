"""Parts for data sets that know no domain: splits, tables, samplers, augmentation, loaders.

May import ``core`` and the layers below it. A data set itself belongs to its system. Read
``stagesweep.base.view`` first, for the contract, then ``split.py``.
"""
