"""MLflow's judges (`mlflow.genai`), asked which of two answers is better.

Imported only where such a judge is asked for: MLflow takes seconds.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, Literal

from mlflow.exceptions import MlflowException
from mlflow.genai.judges import make_judge

from kto_dist.base.errors import UserError
from kto_dist.base.secrets import masked

TASK = (
    "{instructions}\n\nA user wrote: {{{{ inputs }}}}\n\nThese are the two answers: {{{{ outputs }}}}\n\n"
    "Say first if the first answer is better, second if the second one is, and tie if neither is."
)


def mlflow_judge(
    model: str, instructions: str, base_url: str | None, settings: dict[str, Any]
) -> Callable[[str, str, str], str]:
    """(prompt, first answer, second answer) -> first, second or tie. `model`: as openai:/gpt-4o-mini.

    `base_url`: of an OpenAI-compatible server, up to /v1. Raises `UserError`, as what it returns does.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    if base_url is not None:
        # MLflow insists on a key, which a server of one's own may not ask for
        os.environ.setdefault("OPENAI_API_KEY", "none")
    try:
        judge = make_judge(
            name="preference",
            instructions=TASK.format(instructions=instructions),
            model=model,
            feedback_value_type=Literal["first", "second", "tie"],
            # it posts to the address as it is
            base_url=None if base_url is None else f"{base_url.rstrip('/')}/chat/completions",
            inference_params=settings,
        )
    except MlflowException as error:
        raise UserError(f"judge.model ({model}) makes no judge of MLflow's: {masked(str(error))}") from None

    def verdict(prompt: str, first: str, second: str) -> str:
        try:
            found: Any = judge(inputs={"prompt": prompt}, outputs={"first": first, "second": second})
            return str(found.value)
        except (MlflowException, OSError, ValueError) as error:
            raise UserError(f"MLflow's judge ({model}) failed: {masked(str(error))[:500]}") from None

    return verdict
