"""Losses side by side: several runs on one store, and one page that says how they differ.

May import: `training` and what it may import. Open first: `compare.py`.
"""
