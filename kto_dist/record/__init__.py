"""What a run leaves behind: MLflow, its folder, its report. The only importer of mlflow.

May import: `base`. Open first: `tracker.py`.
"""
