"""Which environment variables go along to the other hosts, and which of them nobody may see."""

import re
from collections.abc import Iterable, Mapping

from kto_dist.base.secrets import masked

_ALONG = re.compile(
    r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS|TOKENIZERS|SAFETENSORS|DATASETS|NCCL|GLOO|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|DS"
    r"|DEEPSPEED|MLFLOW|AWS|GOOGLE|GCLOUD|AZURE|S3|FSSPEC|KTO|OMP|MKL|OPENBLAS|CUDA|NVIDIA|UCX|FI|PYTHON|XDG_CACHE)_\w+"
    r"|HF_HOME|PYTHONPATH|LD_LIBRARY_PATH|PATH|LANG|LC_ALL|TMPDIR|OPENAI_API_KEY"
    r"|(http|https|no|all)_proxy|(HTTP|HTTPS|NO|ALL)_PROXY"
)
# A host's own, or a job's that this one would otherwise be taken for.
_NOT = re.compile(r"CUDA_VISIBLE_DEVICES|KTO_DIST_\w+|TORCHELASTIC_\w+|NVIDIA_VISIBLE_DEVICES")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|PWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|_KEY$|PRIVATE", re.IGNORECASE)


def forwarded(environment: Mapping[str, str], more: Iterable[str] = ()) -> dict[str, str]:
    """Of this host's environment, by rule and by name."""
    wanted = set(more)
    return {
        name: value
        for name, value in sorted(environment.items())
        if name in wanted or (_ALONG.fullmatch(name) and not _NOT.fullmatch(name))
    }


def shown(environment: Mapping[str, str]) -> dict[str, str]:
    """For people: `***` in place of what is named like a secret, and of passwords in URLs."""
    return {name: "***" if _SECRET.search(name) else masked(value) for name, value in environment.items()}
