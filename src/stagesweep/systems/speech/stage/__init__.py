"""The stages of the recipe, in order: pretrain, extract, cluster, gate, experts, baselines,
evaluate. The joint training (`asr`) is the shared stage `fit`.
"""
