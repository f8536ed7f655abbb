"""A step's loss and its figures: the table of losses, rows of metrics and their sums. Knows nothing of ranks.

May import: `model`, `data`, `base`. Open first: `objective.py`.
"""
