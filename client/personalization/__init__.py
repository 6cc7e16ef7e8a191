"""Ways to personalize, by level: input (profile, retrieval), model (adapters), objective (preferences).

Model-level methods are rows of a table (`methods.METHODS`) that the trainer, the gate and the aggregation read.
"""
