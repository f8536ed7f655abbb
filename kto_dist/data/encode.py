"""A chunk of rows -> prompt and completion tokens, cut to length, held-out rows apart.

In:  rows as `formats.read_rows` gives them, and an `Encoder`: the tokenizer and the settings that decide the tokens.
Out: one `Part` a split, and what could not be read. It runs in the worker processes too.

1. `texts.as_text`   a row -> text: messages through the chat template, text as it is
2. `_tokens`         the whole text -> tokens, cut where the prompt's own tokens end
3. `_part`           cut to length, counted, as an Arrow batch

The prompt has the header that starts an answer, so that its tokens are the ones that the model sees when it generates;
the completion is what the template writes after that, up to the last EOS (what follows is never generated). Both are
tokenised as one text, and cut at the common prefix of its tokens and those of the prompt alone: a token that joins the
end of the prompt with the start of the answer is the answer's. Where the answer's header differs between the two
renderings (a template that opens a thought for new answers only), the prompt ends where they part; a row whose earlier
turns differ as well cannot be told apart into prompt and completion: it is a bad row. Prompts that were text get the
tokenizer's special tokens except a final EOS, completions that were text get one EOS.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kto_dist.base.errors import UserError
from kto_dist.data.examples import fit
from kto_dist.data.records import short
from kto_dist.data.rows import BadRows, Row, line_of
from kto_dist.data.spelling import Ids, Speller, bare, common_prefix, restored
from kto_dist.data.template import ChatTemplate
from kto_dist.data.texts import Text, Unfit, as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "completion_ids": pa.list_(pa.int32()),
        "desirable": pa.bool_(),
        "probability": pa.float64(),
        "weight": pa.float64(),
        "prompt_group": pa.int64(),
        "pair": pa.int64(),
        "source": pa.int16(),
        "file": pa.int32(),
        "line": pa.int64(),
        "content": pa.uint64(),
        "cuts": pa.large_string(),
        "prompt": pa.large_string(),
        "completion": pa.large_string(),
        "template": pa.large_string(),
    }
)
JOINED = "prompts end a token early, because the tokenizer joins their end with the start of the answer"
ENDLESS = "answers without an end: no EOS, and no other special token, closes them, so that stopping is not learned"
UNSPELLED = "prompts whose tokens don't spell their text: the tokenizer cannot write some of it"
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
    sources: np.ndarray
    """(S, 2) int64: kept rows by source, undesirable and desirable."""
    shortened_headers: int

    def numbered(self, first_pair: int) -> "Part":
        """Pairs that are numbered from 0 on, numbered on from so many."""
        if not first_pair:
            return self
        place = SCHEMA.get_field_index("pair")
        columns = [*self.batch.columns]
        columns[place] = pc.add(columns[place], pa.scalar(first_pair, pa.int64()))
        return replace(self, batch=pa.record_batch(columns, schema=SCHEMA))


@dataclass(frozen=True, kw_only=True)
class Encoder:
    tokenizer: "PreTrainedTokenizerBase"
    template: ChatTemplate | None
    """None where the tokenizer has none."""
    max_length: int
    prompt_limit: int
    on_bad_row: str
    fraction: float | None
    """Of the prompts that are held out, by the hash of the prompt before cutting, which knows no seed: a row stays on
    its side as the log grows."""
    sources: int
    """How many there are."""
    files: tuple[str, ...] = ()
    """Their names, in order, as the rows' places have them."""

    @cached_property
    def file_numbers(self) -> dict[str, int]:
        # a file that is given twice is the same one
        return {name: number for number, name in reversed([*enumerate(self.files)])}

    @cached_property
    def speller(self) -> Speller:
        return Speller(self.tokenizer)

    @cached_property
    def endings(self) -> frozenset[int]:
        """Ids of the tokens that may end a turn, EOS among them: templates end a call otherwise than an answer."""
        special = [number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        marks = self.template.endings if self.template else ()
        return frozenset([*special, *cast(list[int], self.tokenizer.convert_tokens_to_ids(list(marks)))])

    def __call__(self, rows: list[Row]) -> tuple[list[Part], BadRows]:
        seen = BadRows()
        eos = self.tokenizer.eos_token
        texts: list[Text | Unfit] = []
        trouble = None
        for row in rows:
            try:
                texts.append(as_text(row, self.template, eos if isinstance(eos, str) else None, seen))
            except Unfit as error:
                texts.append(error)
            except UserError as error:
                trouble = error
                break
        made = iter(_tokens(self, [text for text in texts if isinstance(text, Text)], seen))
        tokens = []
        # in the rows' order, so that the first one that is wrong is the one that is said
        for row, text in zip(rows, texts, strict=False):
            sides = text if isinstance(text, Unfit) else next(made)
            if isinstance(sides, Unfit):
                self._refuse(row, sides, seen)
                continue
            assert isinstance(text, Text)
            tokens.append(_Tokens(text=text, prompt=sides[0], completion=sides[1], group=sides[2]))
        if trouble is not None:
            raise trouble
        if self.fraction is None:
            return [_part(self, tokens)], seen
        limit = self.fraction * 2**64
        heldout = [_hash64(_canonical(row.text.row.prompt).encode()) < limit for row in tokens]
        kept = [row for row, held in zip(tokens, heldout, strict=True) if not held]
        held = [row for row, held in zip(tokens, heldout, strict=True) if held]
        return [_part(self, kept), _part(self, held)], seen

    def _refuse(self, row: Row, error: Unfit, seen: BadRows) -> None:
        message = f"{row.source}: {error}"
        if self.on_bad_row == "error":
            raise UserError(f"{message}; correct the row, or set data.on_bad_row to skip") from None
        seen.add(error.reason, message, *_place(self, row.source))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    text: Text
    prompt: Ids
    completion: Ids
    group: int
    """A hash of the prompt's own tokens, before it met its answer and before it was cut."""


def _tokens(encoder: Encoder, texts: Sequence[Text], seen: BadRows) -> list[tuple[Ids, Ids, int] | Unfit]:
    """For each row the tokens of prompt and completion, and the prompt's group."""
    speller = encoder.speller
    prompts: list[Ids] = [[]] * len(texts)
    wholes: list[Ids] = [[]] * len(texts)
    for plain in (False, True):
        places = [place for place, text in enumerate(texts) if text.plain == plain]
        chosen = [texts[place] for place in places]
        # many answers have the same prompt
        asked = list(dict.fromkeys((text.prompt, text.typed_before) for text in chosen))
        alone = speller.ids([prompt for prompt, _ in asked], special=plain, typed=[typed for _, typed in asked])
        full = speller.ids([text.full for text in chosen], special=plain, typed=[text.typed for text in chosen])
        if plain:
            alone, full = ([speller.opened(ids) for ids in side] for side in (alone, full))
        of_prompt = dict(zip(asked, alone, strict=True))
        for place, text, ids in zip(places, chosen, full, strict=True):
            prompts[place], wholes[place] = of_prompt[text.prompt, text.typed_before], ids
    spoken = [restored(text.full, text.typed) for text in texts]
    spelled = speller.spells([speller.without_bos(ids, text) for ids, text in zip(wholes, spoken, strict=True)], spoken)
    return [_cut(encoder, *row, seen) for row in zip(texts, prompts, wholes, spelled, strict=True)]


def _cut(
    encoder: Encoder, text: Text, prompt: Ids, whole: Ids, spelled: bool, seen: BadRows
) -> tuple[Ids, Ids, int] | Unfit:
    speller, group = encoder.speller, _hash64(np.array(prompt, np.int32).tobytes())
    if text.says_nothing:
        return prompt, [], group
    seam = common_prefix(prompt, whole)
    if seam < len(prompt):
        seen.note(JOINED, text.row.source, short(speller.decoded([whole[seam:]])[0][:40]))
    prompt, completion = whole[:seam], whole[seam:]
    if not seam:  # one token from the first character on: nothing would be left to answer
        prompt, completion = speller.ids([text.prompt, text.full[len(text.prompt) :]])
    if not spelled:
        answer = bare(text.full[len(text.prompt) :])
        if not bare(speller.decoded([completion])[0]).endswith(answer):
            return Unfit(
                "not spelled by its tokens",
                f"the tokenizer cannot write this answer ({short(answer)}): its tokens say "
                f"{short(speller.decoded([completion])[0])}",
            )
        seen.note(UNSPELLED, text.row.source, short(text.prompt[-60:]))
    return prompt, _ended(encoder, text, completion, seen), group


def _ended(encoder: Encoder, text: Text, completion: Ids, seen: BadRows) -> Ids:
    """A completion up to its end; text gets an EOS."""
    eos = encoder.tokenizer.eos_token_id
    if text.plain:
        if eos is None:
            seen.note(ENDLESS, text.row.source, short(text.full[-40:]))
            return completion
        return completion if completion[-1:] == [eos] else [*completion, eos]
    if eos in completion:
        return _up_to_last(completion, {eos})
    # the end of a turn is another token, as <end_of_turn> is: what follows it is no part of the answer
    ended = _up_to_last(completion, encoder.endings)
    if not encoder.endings & {*completion} or encoder.speller.decoded([completion[len(ended) :]])[0].strip():
        seen.note(ENDLESS, text.row.source, short(text.full[-40:]))
        return completion
    return ended


def _up_to_last(ids: Ids, ends: Collection[int]) -> Ids:
    return ids[: next((place for place in range(len(ids), 0, -1) if ids[place - 1] in ends), 0)]


def _part(encoder: Encoder, rows: Sequence[_Tokens]) -> Part:
    lengths = np.array([[len(row.prompt), len(row.completion)] for row in rows], np.int64).reshape(-1, 2).T
    prompt_kept, completion_kept = fit(lengths[0], lengths[1], encoder.max_length, encoder.prompt_limit)
    kept = (completion_kept > 0) & (lengths[0] > 0)
    up = np.array([row.text.row.desirable for row in rows], bool)
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
    chosen = [rows[place] for place in np.flatnonzero(kept).tolist()]
    originals = [row.text.row for row in chosen]
    prompts = [
        np.array(row.prompt[len(row.prompt) - count :], np.int32)
        for row, count in zip(chosen, prompt_kept[kept], strict=True)
    ]
    completions = [
        np.array(row.completion[:count], np.int32) for row, count in zip(chosen, completion_kept[kept], strict=True)
    ]
    sources = np.zeros((encoder.sources, 2), np.int64)
    np.add.at(sources, ([row.origin for row in originals], up[kept].astype(int)), 1)
    places = [_place(encoder, row.source) for row in originals]
    contents = np.array(
        [
            _hash64(b"%d " % len(prompt) + prompt.tobytes() + completion.tobytes())
            for prompt, completion in zip(prompts, completions, strict=True)
        ],
        np.uint64,
    )
    batch = pa.record_batch(
        [
            pa.array(prompts, pa.list_(pa.int32())),
            pa.array(completions, pa.list_(pa.int32())),
            pa.array(up[kept]),
            pa.array([_probability(row) for row in originals], pa.float64()),
            pa.array([row.weight for row in originals], pa.float64()),
            pa.array(np.array([row.group for row in chosen], np.uint64).view(np.int64)),
            pa.array([row.pair for row in originals], pa.int64()),
            pa.array([row.origin for row in originals], pa.int16()),
            pa.array([file for file, _ in places], pa.int32()),
            pa.array([line for _, line in places], pa.int64()),
            pa.array(contents, pa.uint64()),
            pa.array([_canonical(row.cuts) if row.cuts else None for row in originals], pa.large_string()),
            pa.array([_canonical(row.prompt) for row in originals], pa.large_string()),
            pa.array([_canonical(row.completion) for row in originals], pa.large_string()),
            pa.array([_beside(row) for row in originals], pa.large_string()),
        ],
        schema=SCHEMA,
    )
    return Part(
        batch=batch,
        digests=b"".join(_digests(originals, prompts, completions)),
        contents=contents,
        counts=np.stack([facts[:, ~up].sum(1), facts[:, up].sum(1)]),
        sources=sources,
        shortened_headers=sum(row.text.cut_header for row in rows),
    )


def _digests(rows: Sequence[Row], prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> Iterator[bytes]:
    """Of what of each row is trained on."""
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        facts = b"%d %d %r " % (len(prompt), row.desirable, row.weight)
        if row.probability is not None:
            facts += b"%r " % row.probability
        yield hashlib.blake2b(facts + prompt.tobytes() + completion.tobytes(), digest_size=16).digest()


def _probability(row: Row) -> float:
    return float(row.desirable) if row.probability is None else row.probability


def _place(encoder: Encoder, place: str) -> tuple[int, int]:
    """The number of the file, -1 for one that is not among them, and the line or row in it."""
    return encoder.file_numbers.get(place.rpartition(":")[0], -1), line_of(place)


def _beside(row: Row) -> str | None:
    """What a row gives the chat template beside its messages, as JSON."""
    given = {"tools": list(row.tools), "settings": dict(row.template_kwargs)}
    return _canonical({name: value for name, value in given.items() if value}) if any(given.values()) else None


def _canonical(side: Any) -> str:
    return json.dumps(side, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)


def _hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
