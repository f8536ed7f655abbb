"""Tags of a run that change while it goes on, in MLflow."""

from pathlib import Path

from mlflow import MlflowClient

from kto_dist.record import tracking
from kto_dist.record.tracker import NullTracker
from kto_dist.training.config import Config


def test_tags_arrive_with_their_last_value_and_without_passwords(tmp_path: Path) -> None:
    uri, warnings = f"sqlite:///{tmp_path / 'mlflow.db'}", list[str]()
    config = Config(model={"path": "model"}, data={"train": "rows.jsonl"}, tracking={"uri": uri})
    tracker = tracking.start(
        config.tracking,
        settings=config,
        name="first",
        folder=tmp_path,
        run_id=None,
        tags={},
        default_uri=uri,
        warn=warnings.append,
    )
    assert not isinstance(tracker, NullTracker), warnings
    for value in ("warned: flat", "stopped: max_kl"):
        tracker.tag({"health": value, f"health.{value.split()[1]}": "see http://me:secret@host/"})
    tracker.tag({f"many.{number}": "x" * 6000 for number in range(150)})
    tracker.finish("FINISHED")
    tags = MlflowClient(uri).get_run(tracker.run_id).data.tags
    assert tags["health"] == "stopped: max_kl" and tags["health.flat"] == "see http://***@host/"
    assert sum(name.startswith("many.") for name in tags) == 150 and not warnings
