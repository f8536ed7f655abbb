"""The `tracking` section: MLflow and the report."""

from pydantic import ConfigDict, Field

from kto_dist.base.config import Section, Text


class TrackingConfig(Section):
    """MLflow and the report."""

    enabled: bool = Field(True, description="false: metrics.jsonl and the report only")
    uri: str | None = Field(None, description="MLflow tracking URI; null: a SQLite file beside the runs")
    experiment: Text = Field("kto", description="MLflow experiment")
    report: bool = Field(True, description="report.html and plots at the end; they take seconds, much of a short run")
    run_name: str | None = Field(None, description="MLflow run; null: the name of the output folder")
    log_model: bool = Field(False, description="upload the exported model as an artifact of the run")
    register_as: str | None = Field(
        None, alias="register", description="name in the model registry (uploads the model)"
    )

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True)
