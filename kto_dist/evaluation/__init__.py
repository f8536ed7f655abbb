"""Held-out rows under the current policy.

May import: `objective`, `reference` and what these may import. Open first: `heldout.py`.
"""
