"""`kto-dist ...` and what the launchers start: each a few lines around a function of a wing.

May import: everything. Open first: `cli.py`.
"""
