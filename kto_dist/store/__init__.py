"""Log-probs on disk or in a bucket, keyed by content: which model, which tokens.

May import: `base`. Open first: `store.py`.
"""
