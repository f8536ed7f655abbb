"""Held-out rows under a model: figures, how sure they are, and where they differ.

May import: `objective`, `reference`, `record` and what these may import. Open first: `heldout.py`, then `figures.py`.
"""
