"""One split's tokenised rows, memory-mapped by every rank.

In:  a folder that `tokenise.prepare` made: rows.arrow and, written last, about.json.
Out: `Examples`: tokens as views into the file, and what an estimate of z0 or a report needs of all rows at once.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kto_dist.base.errors import UserError
from kto_dist.base.files import sha256_of, write_whole
from kto_dist.data.turns import Messages

Length = TypeVar("Length", int, np.ndarray)

# Shares of the rows above (and, for the rarer class, below) which `doubts` speaks up.
_CONTRADICTIONS, _DUPLICATES, _RARE = 0.01, 0.1, 0.05


def fit(prompt: Length, completion: Length, max_length: int, prompt_limit: int) -> tuple[Length, Length]:
    """Tokens that the prompt (from its end) and the completion (from its start) keep.

    An over-long pair first loses the start of its prompt, as much as needed but not below `prompt_limit`,
    then the end of its completion. Lengths are ints or arrays of them; needs prompt_limit < max_length.
    """
    prompt_kept = np.maximum(np.minimum(prompt, prompt_limit), np.minimum(prompt, max_length - completion))
    completion_kept = np.minimum(completion, max_length - prompt_kept)
    if isinstance(prompt, int):
        return int(prompt_kept), int(completion_kept)
    return prompt_kept, completion_kept


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassReport:
    """What became of the rows of one class."""

    kept: int
    prompts_cut: int
    completions_cut: int
    dropped: int
    """Their completion, or the text of their prompt, makes no token."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """What a split holds, and what happened on the way."""

    rows_read: int
    """Rows of this split that could be read: kept + dropped, both classes."""
    skipped: dict[str, int]
    """Reason -> rows of the files that could not be read; a split made by fraction shows those of the whole log."""
    skipped_examples: list[str]
    unused: dict[str, int]
    """Column, or key of a message -> rows that have it and that nothing reads; of the whole log, as `skipped`."""
    notes: dict[str, int]
    """What was found and may not be meant -> rows; of the whole log, as `skipped`."""
    first: dict[str, str]
    """Of each note the first row's place, and what it is about."""
    sources: list[tuple[int, int]]
    """Of each source of `data.train`: kept rows that are desirable, and undesirable."""
    shortened_headers: int
    """Rows whose prompt ends before the template's answer header does (see encode.py)."""
    desirable: ClassReport
    """A row whose label is a probability counts here to the likelier class, as it does below."""
    undesirable: ClassReport
    duplicates: int
    """Kept rows whose tokens and label an earlier row has."""
    contradictions: int
    """Kept rows whose tokens another row has with the other label."""
    prompt_lengths: dict[str, int]
    """Quantile -> tokens, of the kept rows, after cutting."""
    completion_lengths: dict[str, int]
    """As `prompt_lengths`."""
    soft: int = 0
    """Kept rows whose label is a probability above 0 and below 1."""
    expected: float | None = None
    """Then, the sum of the probabilities of all kept rows: how many of them are desirable."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataReport":
        classes = {name: ClassReport(**values[name]) for name in ("desirable", "undesirable")}
        return cls(**{**values, **classes, "sources": [(up, down) for up, down in values["sources"]]})

    def noticed(self) -> list[str]:
        """What was seen and not used, and what may not be meant, each with its count."""
        found = [f"{count:,} {note} (first {self.first.get(note, '')})" for note, count in self.notes.items()]
        if self.unused:
            listed = ", ".join(f"{name} ({count:,})" for name, count in sorted(self.unused.items()))
            found.append(f"seen and not used, with the number of rows: {listed}")
        return found

    def lines(self, names: Sequence[str] = ()) -> list[str]:
        """The summary for people; `names` are those of the sources."""
        classes = {"desirable": self.desirable, "undesirable": self.undesirable}
        kept = " + ".join(f"{counts.kept:,} {name}" for name, counts in classes.items())
        skipped = sum(self.skipped.values())
        lines = [f"{self.rows_read:,} rows read, {skipped:,} skipped; kept {kept}"]
        lines += [f"  skipped, {reason}: {count:,}" for reason, count in sorted(self.skipped.items())]
        lines += [f"    {example}" for example in self.skipped_examples]
        for name, counts in classes.items():
            lines.append(
                f"  {name}: {counts.prompt_tokens:,} prompt and {counts.completion_tokens:,} completion "
                f"tokens; {counts.prompts_cut:,} prompts and {counts.completions_cut:,} completions cut, "
                f"{counts.dropped:,} rows dropped (empty)"
            )
        if self.expected is not None:
            rows = self.desirable.kept + self.undesirable.kept
            lines.append(
                f"  {self.soft:,} labels are probabilities, by which {self.expected:,.1f} of {rows:,} rows are "
                "desirable (above, each counts to its likelier class)"
            )
        for name, (up, down) in zip(names, self.sources, strict=False) if len(self.sources) > 1 else ():
            lines.append(f"  source {name}: {up:,} desirable, {down:,} undesirable")
        for name, lengths in (("prompt", self.prompt_lengths), ("completion", self.completion_lengths)):
            lines.append(f"  {name} tokens: " + ", ".join(f"{key} {value:,}" for key, value in lengths.items()))
        if self.shortened_headers:
            lines.append(f"  {self.shortened_headers:,} prompts end before the template's answer header does")
        if self.duplicates or self.contradictions:
            twins = f"{self.contradictions:,} have a twin with the other label"
            lines.append(f"  {self.duplicates:,} rows repeat another one, {twins}")
        return lines

    def doubts(self) -> list[str]:
        """What speaks against training on these rows, each with its number and a remedy."""
        rows = self.desirable.kept + self.undesirable.kept
        up = self.desirable.kept if self.expected is None else self.expected
        least, name = min((up, "thumbs up"), (rows - up, "thumbs down"))
        found = []
        if self.contradictions > _CONTRADICTIONS * rows:
            found.append(
                f"{self.contradictions:,} of {rows:,} rows ({self.contradictions / rows:.1%}) have a twin with the "
                "other label, which pulls the model both ways: `kto-dist mine` settles such conflicts by majority"
            )
        if self.duplicates > _DUPLICATES * rows:
            found.append(
                f"{self.duplicates:,} of {rows:,} rows ({self.duplicates / rows:.1%}) repeat another one, so that "
                "their answers count several times: `kto-dist mine` makes one row of them"
            )
        if least < _RARE * rows:
            found.append(
                f"{least:,.0f} of {rows:,} rows ({least / rows:.1%}) are {name}: class weights even out the sum and "
                "not the variety; collect more of them, or leave out some of the others"
            )
        return found


class Examples:
    """The tokenised rows of one split (N of them), read-only, as `load` opens them."""

    def __init__(self, table: pa.Table, *, fingerprint: str, report: DataReport) -> None:
        self._table = table
        # a table makes its columns anew for whoever asks, of thousands of chunks
        self._prompts, self._completions = table["prompt_ids"], table["completion_ids"]
        self.prompt_lengths: np.ndarray = pc.list_value_length(self._prompts).to_numpy()
        """(N,) int32, tokens after cutting."""
        self.completion_lengths: np.ndarray = pc.list_value_length(self._completions).to_numpy()
        """(N,) int32, tokens after cutting, at least one."""
        self.desirable: np.ndarray = table["desirable"].to_numpy()
        """(N,) bool; where the label is a probability, whether it is at least a half."""
        self.weights: np.ndarray = table["weight"].to_numpy()
        """(N,) float64, 0 or more, from the log."""
        self.prompt_group: np.ndarray = table["prompt_group"].to_numpy()
        """(N,) int64, a hash: equal for rows whose prompts have equal tokens before they are cut to length."""
        self.fingerprint = fingerprint
        """Of all tokens, labels and weights, in order."""
        self.report = report

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @cached_property
    def probability(self) -> np.ndarray:
        """(N,) float64, that the row is desirable: 1 or 0 where the label is certain, as all are without the column."""
        if "probability" not in self._table.column_names:
            return self.desirable.astype(np.float64)
        return self._table["probability"].to_numpy()

    @cached_property
    def is_soft(self) -> bool:
        """Whether some label is a probability above 0 and below 1."""
        return bool(((self.probability > 0) & (self.probability < 1)).any())

    @cached_property
    def source(self) -> np.ndarray:
        """(N,) int16, the number of the row's source in `data.train`."""
        return self._table["source"].to_numpy()

    @cached_property
    def contradicted(self) -> np.ndarray:
        """(N,) bool: another row has the same tokens with the other label."""
        content = np.unique(self._table["content"].to_numpy(), return_inverse=True)[1].ravel()
        up = np.bincount(content, weights=self.desirable)
        return ((up > 0) & (up < np.bincount(content)))[content]

    def cuts(self) -> dict[str, np.ndarray]:
        """Column of `data.slices` -> (N,) its value in each row, as text; empty where a row has none."""
        found = [json.loads(text) if text else {} for text in self._table["cuts"].to_pylist()]
        names = dict.fromkeys(name for row in found for name in row)
        return {name: np.array([row.get(name, "") for row in found]) for name in names}

    def place(self, row: int) -> tuple[int, int]:
        """The number of the row's file among those of its split, -1 where it is not known; and its line, from 1."""
        return int(self._table["file"][row].as_py()), int(self._table["line"][row].as_py())

    @cached_property
    def pair(self) -> np.ndarray:
        """(N,) int64: the row that is the other answer of the same pair, chosen or rejected; -1 where there is none."""
        number, partner = self._table["pair"], np.full(len(self), -1, np.int64)
        rows = np.flatnonzero(number.is_valid().to_numpy())
        numbers = number.drop_null().to_numpy()
        order = numbers.argsort(kind="stable")
        twins = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])
        first, second = rows[order[twins]], rows[order[twins + 1]]
        partner[first], partner[second] = second, first
        return partner

    def prompt(self, row: int) -> np.ndarray:
        """(P,) int32"""
        return self._prompts[row].values.to_numpy()

    def completion(self, row: int) -> np.ndarray:
        """(C,) int32"""
        return self._completions[row].values.to_numpy()

    def token_chunks(self, side: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each stretch of rows (n of them): (n + 1,) int64 offsets, and the (T,) int32 tokens that they cut.

        `side`: prompt or completion. For passes over all rows, where a look-up a row would take most of the time.
        """
        for chunk in self._table[f"{side}_ids"].chunks:
            yield chunk.offsets.to_numpy().astype(np.int64), chunk.values.to_numpy()

    def original(self, row: int) -> tuple[str | Messages, str | Messages]:
        """Prompt and completion as they were in the log, uncut: text, or messages."""
        sides = (json.loads(self._table[name][row].as_py()) for name in ("prompt", "completion"))
        prompt, completion = (side if isinstance(side, str) else tuple(side) for side in sides)
        return prompt, completion

    def beside(self, row: int) -> dict[str, Any]:
        """What the chat template was given beside the messages: `tools` and `settings`, where the row has them."""
        given = self._table["template"][row].as_py()
        found: dict[str, Any] = {} if given is None else json.loads(given)
        return found

    def prompt_text(self, row: int) -> str:
        """The prompt for people to read; messages become `role: content` paragraphs."""
        prompt = self.original(row)[0]
        if isinstance(prompt, str):
            return prompt
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)

    def completion_text(self, row: int) -> str:
        """The completion for people to read."""
        completion = self.original(row)[1]
        return completion if isinstance(completion, str) else "\n\n".join(turn["content"] for turn in completion)


def load(folder: str | Path) -> Examples:
    """Opens a folder that `tokenise.prepare` returned. Costs neither reading the tokens nor memory for them."""
    folder = Path(folder)
    about = _about(folder)
    if about is None or not is_whole(folder):
        raise UserError(f"tokenised data {folder} is missing or damaged: delete the folder above it and run again")
    table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    return Examples(table, fingerprint=about["fingerprint"], report=DataReport.from_dict(about["report"]))


def on_the_spot(prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> Examples:
    """Rows of token ids that no log holds: a model's own answers. What a log says of rows, they have not."""
    count, nobody = (
        len(prompts),
        ClassReport(kept=0, prompts_cut=0, completions_cut=0, dropped=0, prompt_tokens=0, completion_tokens=0),
    )
    groups = np.unique([prompt.tobytes() for prompt in prompts], return_inverse=True)[1].ravel()
    table = pa.table(
        {
            "prompt_ids": pa.array([prompt.astype(np.int32) for prompt in prompts], pa.list_(pa.int32())),
            "completion_ids": pa.array([ids.astype(np.int32) for ids in completions], pa.list_(pa.int32())),
            "desirable": pa.array(np.ones(count, bool)),
            "weight": pa.array(np.ones(count)),
            "prompt_group": pa.array(groups.astype(np.int64)),
            "pair": pa.nulls(count, pa.int64()),
            "source": pa.array(np.zeros(count, np.int16)),
        }
    )
    report = DataReport(
        rows_read=0,
        skipped={},
        skipped_examples=[],
        unused={},
        notes={},
        first={},
        sources=[],
        shortened_headers=0,
        desirable=nobody,
        undesirable=nobody,
        duplicates=0,
        contradictions=0,
        prompt_lengths={},
        completion_lengths={},
    )
    return Examples(table, fingerprint="made on the spot", report=report)


def check(examples: Examples, *, needs_both: bool = True, needs_pairs: bool, name: str = "data.train") -> None:
    """Raises `UserError` where rows cannot train: a desirable one, with `needs_both` an undesirable one, or with
    `needs_pairs` a second prompt is absent."""
    up, down = ((side > 0).any() for side in (examples.probability, 1 - examples.probability))
    for label, found in (("desirable", up), ("undesirable", down))[: 1 + needs_both]:
        if not found:
            needs = "the loss needs both classes" if needs_both else "the loss is of these alone"
            raise UserError(
                f"{name} has {len(examples)} rows and not one {label} among them: {needs}; "
                "add thumbs of the other kind, or check how the label column is written"
            )
    if needs_pairs and not (examples.prompt_group != examples.prompt_group[0]).any():
        raise UserError(
            f"{name} has {len(examples)} rows with one and the same prompt: z0 is estimated on a prompt "
            "with another prompt's completion; add prompts, or use "
            "objective.loss=apo_zero_unpaired, which has no z0"
        )


def check_ids(examples: Examples, rows: int | None, whose: str, name: str = "data.train") -> None:
    """Raises `UserError` where a token has no row in an embedding of so many `rows` (None: not known)."""
    highest = max(
        (int(ids.max()) for side in ("prompt", "completion") for _, ids in examples.token_chunks(side) if ids.size),
        default=-1,
    )
    if rows is not None and highest >= rows:
        raise UserError(
            f"{name} has token {highest}, and the embedding of {whose} has {rows} rows (vocab_size): the tokenizer has "
            "tokens that the model has not; give the model's own tokenizer, or a model whose embedding was resized"
        )


def is_whole(folder: Path) -> bool:
    """Whether the folder has all of its rows; what a crash or a full disk left behind has not. Reads no rows."""
    about = _about(folder)
    try:
        return about is not None and (folder / "rows.arrow").stat().st_size == about["bytes"]
    except OSError:
        return False


def damage(folder: Path) -> str | None:
    """What is wrong with the folder, of which every byte is read; None where nothing is."""
    about = _about(folder)
    if about is None:
        return "about.json is missing, or is not as it was written"
    try:
        if not is_whole(folder):
            return "rows.arrow has another size than was written"
        return (
            None if sha256_of(folder / "rows.arrow") == about["sha256"] else "rows.arrow has other bytes than written"
        )
    except OSError as error:
        return f"rows.arrow cannot be read: {error}"


def write_about(folder: Path, fingerprint: str, report: DataReport) -> None:
    """Of rows that are written whole."""
    rows = folder / "rows.arrow"
    about = {
        "fingerprint": fingerprint,
        "bytes": rows.stat().st_size,
        "sha256": sha256_of(rows),
        "report": report.to_dict(),
    }
    write_whole(folder / "about.json", _encoded({**about, "checksum": _checksum(about)}))


def _about(folder: Path) -> dict[str, Any] | None:
    """None where it cannot be believed."""
    try:
        about: dict[str, Any] = json.loads((folder / "about.json").read_bytes())
        return about if about.pop("checksum") == _checksum(about) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _encoded(about: dict[str, Any]) -> bytes:
    return json.dumps(about, indent=1).encode()


def _checksum(about: dict[str, Any]) -> str:
    return hashlib.sha256(_encoded(about)).hexdigest()
