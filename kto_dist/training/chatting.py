"""What `kto-dist chat` was asked for: a run, or two models, found and loaded."""

from pathlib import Path

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.evaluation.chat import Chat, open_chat
from kto_dist.evaluation.generate import Source
from kto_dist.model.config import check_model_path
from kto_dist.record.run_folder import RunFolder
from kto_dist.training.config import Config
from kto_dist.training.judged import Named, model_of, not_a_run


def chat_with(
    target: str, reference: str | None, *, system: str | None, max_tokens: int, temperature: float, seed: int
) -> Chat:
    """Both models of a run, or of two names of models, in memory. Raises `UserError`."""
    run = RunFolder(Path(target))
    config = Config.load(run.config) if run.config.is_file() else None
    trained = model_of(target)
    trust = config is not None and config.model.trust_remote_code
    if reference is not None:
        other = model_of(reference, runs=False)
    elif config is None:
        raise UserError(f"{target} {not_a_run(target)}, so its reference is not known: give --reference MODEL")
    elif config.reference.path is not None:
        other = Named(path=config.reference.path, gguf_file=config.reference.gguf_file)
    else:
        other = Named(path=config.model.path, gguf_file=config.model.gguf_file, adapter=config.adapter.start)
    own = config is not None and config.reference.path is not None and reference is None
    sides = []
    for name, named, trusted in (
        ("the model", trained, trust),
        ("the reference", other, config.reference.trust_remote_code if own and config is not None else trust),
    ):
        check_model_path(name, named.path)
        sides.append(
            Source(
                path=named.path,
                gguf_file=named.gguf_file,
                trust_remote_code=trusted,
                adapter=named.adapter,
                # the weights that an adapter was trained beside, and those that it is compared with
                quantization="none" if config is None or trained.adapter is None else config.model.quantization,
                name=name,
            )
        )
    return open_chat(
        *sides,
        dtype="auto" if config is None else config.train.dtype,
        device=comm.device(),
        settings={} if config is None else config.data.template_kwargs,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        system=system,
    )
