"""From rows of thumbs to micro-batches: sources, formats, tokens on disk, the plan of every step, its cutting.

May import: `base`. Open first: `batch.py`.
"""
