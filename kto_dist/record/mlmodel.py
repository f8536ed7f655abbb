"""An exported model -> the files beside it from which MLflow loads and serves it.

`mlflow.transformers.log_model` would copy the weights once more, import every framework it knows, and fails with
transformers 5 (`pipelines.check_task` changed). The files are few, and their format is documented:
https://mlflow.org/docs/latest/ml/model/
"""

import json
import platform
import uuid
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import yaml


def write_mlmodel(folder: Path, export: Path, model_id: str, run_id: str, location: str) -> None:
    """What `mlflow.transformers.load_model`, `mlflow.pyfunc` and `mlflow models serve` read, but the model itself.

    They expect the export as `model` below `location`, and its tokenizer as `components/tokenizer`. Raises
    `OSError` where the export does not name its architecture.
    """
    try:
        architecture = json.loads((export / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError) as error:
        raise OSError(f"{export.name}/config.json does not name an architecture ({error!r})") from None
    tokenizer = export / "tokenizer_config.json"
    chat = (export / "chat_template.jinja").is_file() or (
        tokenizer.is_file() and "chat_template" in tokenizer.read_text(encoding="utf-8")
    )
    transformers = {
        "transformers_version": version("transformers"),
        "code": None,
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": architecture,
        "source_model_name": export.name,
        "model_binary": "model",
        "tokenizer_type": "AutoTokenizer",
        "components": ["tokenizer"],
        "torch_dtype": None,
    }
    pyfunc = {
        "loader_module": "mlflow.transformers",
        "python_version": platform.python_version(),
        "env": {"virtualenv": "python_env.yaml"},
    }
    model = {
        "artifact_path": location,
        "flavors": {"python_function": pyfunc, "transformers": transformers},
        "mlflow_version": version("mlflow"),
        "model_id": model_id,
        "model_uuid": uuid.uuid4().hex,
        "run_id": run_id,
        "utc_time_created": str(datetime.now(timezone.utc).replace(tzinfo=None)),
    }
    if chat:
        transformers["inference_task"] = "llm/v1/chat"
        model["metadata"] = {"task": "llm/v1/chat"}
    # "2.13.0+cpu" is a build that an index need not have.
    needs = [f"{name}=={version(name).partition('+')[0]}\n" for name in ("mlflow", "torch", "transformers")]
    environment = {
        "python": platform.python_version(),
        "build_dependencies": [],
        "dependencies": ["-r requirements.txt"],
    }
    (folder / "MLmodel").write_text(yaml.safe_dump(model), encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(needs), encoding="utf-8")
    (folder / "python_env.yaml").write_text(yaml.safe_dump(environment), encoding="utf-8")
