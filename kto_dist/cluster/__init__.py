"""A cluster: what a run takes of it, what is looked at before a job, who starts it, watches it and starts it again.

May import: `training` and what it may import. Open first: `launch.py`, or `plan.py` for sizing before renting.
"""
