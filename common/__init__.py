"""What both sides of a federation must agree on.

Nothing here imports torch, and only `wire` imports Flower, so that an
auditor can check a ledger on a machine that has neither.
"""
