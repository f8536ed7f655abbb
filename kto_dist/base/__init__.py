"""What every wing stands on: errors, files, the reader of settings, ranks and their agreement, the console.

May import: nothing of ours. Open first: `errors.py`, then `config.py`.
"""
