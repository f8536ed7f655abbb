"""Sizing before renting: what a run takes of a cluster that is not there yet. Everything here is computed.

May import: `training` and what it may import. Open first: `plan.py`.
"""
