"""The frozen model's side: which one it is, the pass that scores what the store lacks, and its end.

May import: `store`, `model`, `data`, `record`, `base`. Open first: `setup.py`, then `logps.py`.
"""
