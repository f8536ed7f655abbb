"""A chunk of rows -> prompt and completion tokens, cut to length, held-out rows apart.

In:  rows as `formats.read_rows` gives them, and an `Encoder`: the tokenizer and the settings that decide the tokens.
Out: one `Part` a split, and what could not be read. It runs in the worker processes too.

Messages are rendered with the chat template: the prompt with the header that starts an answer, so that its tokens are
the ones that the model sees when it generates; the completion is what the template writes after that, up to the last
EOS (what follows is never generated). Where the answer's header differs between the two renderings (a template that
opens a thought for new answers only), the prompt ends where they part; a row whose earlier turns differ as well cannot
be told apart into prompt and completion: it is a bad row. Text prompts get the tokenizer's special tokens except a
final EOS, text completions get one EOS. Both sides are tokenised apart.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import numpy as np
import pyarrow as pa

from kto_dist.base.errors import UserError
from kto_dist.data.examples import fit
from kto_dist.data.formats import BadRows, Messages, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "completion_ids": pa.list_(pa.int32()),
        "desirable": pa.bool_(),
        "weight": pa.float64(),
        "prompt_group": pa.int64(),
        "pair": pa.int64(),
        "prompt": pa.large_string(),
        "completion": pa.large_string(),
    }
)
COUNTS = ("kept", "prompts_cut", "completions_cut", "dropped", "prompt_tokens", "completion_tokens")
"""What is summed up per class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The rows of one chunk that belong to one split."""

    batch: pa.RecordBatch
    digests: bytes
    """16 bytes a row."""
    contents: np.ndarray
    """(rows,) uint64, a hash: equal for rows with equal tokens, whatever their labels and weights."""
    counts: np.ndarray
    """(2, 6) int64: undesirable and desirable by COUNTS."""
    shortened_headers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    prompt_limit: int
    on_bad_row: str
    fraction: float | None
    """Of the prompts that are held out, by the hash of the prompt before cutting, which knows no seed: a row stays on
    its side as the log grows."""

    def __call__(self, rows: list[Row]) -> tuple[list[Part], BadRows]:
        bad = BadRows()
        texts: list[_Text] = []
        for row in rows:
            try:
                texts.append(_texts(self.tokenizer, row))
            except _Untemplatable as error:
                message = f"{row.source}: the chat template refuses this row: {error}"
                if self.on_bad_row == "error":
                    raise UserError(f"{message}; correct the messages, or set data.on_bad_row to skip") from None
                bad.add("refused by the chat template", message)
        if self.fraction is None:
            return [_encode(self, texts)], bad
        limit = self.fraction * 2**64
        heldout = [_hash64(_canonical(text.row.prompt).encode()) < limit for text in texts]
        kept = [text for text, held in zip(texts, heldout, strict=True) if not held]
        held = [text for text, held in zip(texts, heldout, strict=True) if held]
        return [_encode(self, kept), _encode(self, held)], bad


class _Untemplatable(Exception):
    """The chat template rejects these messages, or hides where the completion starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """A row as text."""

    row: Row
    prompt: str
    completion: str
    shortened: bool
    """Whether the prompt ends before the answer's header does."""

    @property
    def plain(self) -> bool:
        return isinstance(self.row.prompt, str)


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Messages, *, header: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=header)
    # Templates raise the first on purpose (roles must alternate); the second is `None + text` inside one.
    except (jinja2.TemplateError, TypeError) as error:
        raise _Untemplatable(str(error)) from None
    assert isinstance(text, str)
    return text


def _texts(tokenizer: "PreTrainedTokenizerBase", row: Row) -> _Text:
    if isinstance(row.prompt, str) or isinstance(row.completion, str):
        assert isinstance(row.prompt, str) and isinstance(row.completion, str)
        return _Text(row=row, prompt=row.prompt, completion=row.completion, shortened=False)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{row.source} holds chat messages and the tokenizer has no chat template: use the "
            "instruction-tuned model's tokenizer, add a chat_template.jinja to the model's folder, or "
            "write prompts as text"
        )
    prompt = _render(tokenizer, row.prompt, header=True)
    full = _render(tokenizer, row.prompt + row.completion, header=False)
    if full.startswith(prompt):
        return _Text(row=row, prompt=prompt, completion=full[len(prompt) :], shortened=False)
    shorter = min(len(prompt), len(full))
    same = next((place for place in range(shorter) if prompt[place] != full[place]), shorter)
    if same < len(_render(tokenizer, row.prompt, header=False)):
        raise _Untemplatable("it renders the earlier turns differently once the answer follows them")
    return _Text(row=row, prompt=prompt[:same], completion=full[same:], shortened=True)


def _encode(encoder: Encoder, texts: Sequence[_Text]) -> Part:
    rows = [text.row for text in texts]
    prompts, completions = _ids(encoder.tokenizer, texts)
    lengths = np.array([[len(ids) for ids in side] for side in (prompts, completions)], np.int64).reshape(2, -1)
    prompt_kept, completion_kept = fit(lengths[0], lengths[1], encoder.max_length, encoder.prompt_limit)
    kept = (completion_kept > 0) & (lengths[0] > 0)
    desirable = np.array([row.desirable for row in rows], bool)
    facts = np.stack(
        [
            kept,
            kept & (prompt_kept < lengths[0]),
            kept & (completion_kept < lengths[1]),
            ~kept,
            kept * prompt_kept,
            kept * completion_kept,
        ]
    ).astype(np.int64)
    indices = np.flatnonzero(kept)
    prompt_ids = [np.array(prompts[i][len(prompts[i]) - prompt_kept[i] :], np.int32) for i in indices]
    completion_ids = [np.array(completions[i][: completion_kept[i]], np.int32) for i in indices]
    groups = [_hash64(ids.tobytes()) for ids in prompt_ids]
    batch = pa.record_batch(
        [
            pa.array(prompt_ids, pa.list_(pa.int32())),
            pa.array(completion_ids, pa.list_(pa.int32())),
            pa.array(desirable[kept]),
            pa.array([rows[i].weight for i in indices], pa.float64()),
            pa.array(np.array(groups, np.uint64).view(np.int64)),
            pa.array([rows[i].pair for i in indices], pa.int64()),
            pa.array([_canonical(rows[i].prompt) for i in indices], pa.large_string()),
            pa.array([_canonical(rows[i].completion) for i in indices], pa.large_string()),
        ],
        schema=SCHEMA,
    )
    digests = b"".join(
        hashlib.blake2b(
            b"%d %d %r " % (len(prompt), rows[i].desirable, rows[i].weight) + prompt.tobytes() + completion.tobytes(),
            digest_size=16,
        ).digest()
        for i, prompt, completion in zip(indices, prompt_ids, completion_ids, strict=True)
    )
    contents = [
        _hash64(b"%d " % len(prompt) + prompt.tobytes() + completion.tobytes())
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
    ]
    return Part(
        batch=batch,
        digests=digests,
        contents=np.array(contents, np.uint64),
        counts=np.stack([facts[:, ~desirable].sum(1), facts[:, desirable].sum(1)]),
        shortened_headers=sum(text.shortened for text in texts),
    )


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[_Text]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of prompts and of completions; none for a completion that says nothing."""
    plain = np.array([text.plain for text in texts], bool)
    prompts = _prompt_ids(tokenizer, [text.prompt for text in texts], plain)
    completions = _token_ids(tokenizer, [text.completion for text in texts], special=False)
    for index, text in enumerate(texts):
        ended = _to_eos(completions[index], tokenizer, text.plain)
        completions[index] = [] if _says_nothing(text.row) else ended
    return prompts, completions


def _token_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: rows above the tokenizer's own length limit are cut here, not a reason to warn.
    found = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = found["input_ids"]
    return ids


def _prompt_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str], plain: np.ndarray) -> list[list[int]]:
    prompts: list[list[int]] = [[]] * len(texts)
    for special in (False, True):
        places = np.flatnonzero(plain == special)
        for place, ids in zip(places, _token_ids(tokenizer, [texts[i] for i in places], special=special), strict=True):
            prompts[place] = ids
    if plain.any():
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        probe = tokenizer("a")["input_ids"]
        appends_eos = len(probe) > 1 and probe[-1] == eos
        for place in np.flatnonzero(plain):
            ids = prompts[place][:-1] if appends_eos else prompts[place]
            # The text has its own BOS, and the tokenizer added another.
            prompts[place] = ids[1:] if probe[0] == bos and ids[:2] == [bos, bos] else ids
    return prompts


def _to_eos(ids: list[int], tokenizer: "PreTrainedTokenizerBase", plain: bool) -> list[int]:
    eos = tokenizer.eos_token_id
    if plain:
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
    return ids[: len(ids) - ids[::-1].index(eos)] if eos in ids else ids


def _says_nothing(row: Row) -> bool:
    if isinstance(row.completion, str):
        return not row.completion.strip()
    return not any(turn["content"].strip() or turn.get("tool_calls") for turn in row.completion)


def _canonical(side: str | Messages) -> str:
    return json.dumps(side, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)


def _hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
