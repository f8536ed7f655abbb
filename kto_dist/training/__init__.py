"""The run: preparation, loop, step, checkpoints, health, export.

May import: `evaluation` and everything below. Open first: `loop.py`.
"""
