"""What lies beside a model's weights and goes along into the export: generation settings, processors, its code.

In:  a folder or hub name, before training, since a hub may be gone when it ends. Out: a folder here, whose files are
copied as they are; nothing that the export has written itself is replaced, but for the generation settings.
"""

import json
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

_GENERATION = "generation_config.json"
_PROCESSORS = ("*processor*.json", "chat_template*")
_CODE = "*.py"


def beside(path: str) -> Path | None:
    """The folder that holds these files; None where a hub's model has none that can be had."""
    if Path(path).is_dir():
        return Path(path)
    try:
        wanted = ["*.json", *_PROCESSORS, _CODE]
        return Path(snapshot_download(path, allow_patterns=wanted, ignore_patterns=["*/*", "*.safetensors*"]))
    except OSError:
        return None


def unreadable(source: Path | None, name: str = "model.path") -> str | None:
    """What is said where generation settings are there and cannot be read."""
    file = None if source is None else source / _GENERATION
    if file is None or not file.exists():
        return None
    try:
        if isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            return None
        reason = "it holds no JSON object"
    except (OSError, ValueError) as error:
        reason = str(error)
    return (
        f"{_GENERATION} of {name} ({source}) cannot be read ({reason}): the export will have one made from its "
        "config.json, with other sampling and stop tokens perhaps; mend the file first if they matter"
    )


def copy_beside(source: Path | None, target: Path) -> None:
    """Into an export that is being written."""
    if source is None:
        return
    if (source / _GENERATION).exists() and unreadable(source) is None:
        shutil.copyfile(source / _GENERATION, target / _GENERATION)
    patterns = [*_PROCESSORS, *([_CODE] if _brings_code(source) else ())]
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        if not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _brings_code(source: Path) -> bool:
    """Whether some config names classes in Python files of the folder (`auto_map`)."""
    configs = [source / "config.json", source / "tokenizer_config.json", *source.glob("*processor*.json")]
    return any(b'"auto_map"' in file.read_bytes() for file in configs if file.exists())
