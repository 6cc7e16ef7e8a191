"""Ways to personalize, by level: input (profile, retrieval), model (adapters), objective (preferences).

Model-level methods are rows of a table (`common.methods.METHODS`) that both sides read: trainer, gate, aggregation.
"""
