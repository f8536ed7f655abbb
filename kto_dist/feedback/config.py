"""What a mining run is: where the log lies, what its columns mean, and what is done to it.

In:  a YAML file and `section.key=value` overrides, read like a training run's (`kto_dist.base.config`).
Out: `MiningConfig`, frozen and validated. Every step that takes votes has a setting that turns it off. Only what can be
no row to train on always leaves, and is counted like the rest: votes without a label or on an empty prompt, and, with
`agreement.conflicts: keep`, answers whose votes are even.

Regular expressions are RE2's (no look-around, linear time), because DuckDB runs them; `pipeline` tries each one before
it reads a byte of the log.
"""

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kto_dist.base.config import NonNegativeFloat, Paths, Positive, Section, Text, resolve
from kto_dist.base.vocabulary import DOWN, UP, plain
from kto_dist.feedback.columns import ColumnsConfig, RolesConfig, TurnsConfig, WhereConfig
from kto_dist.feedback.presets import laid_over, preset
from kto_dist.feedback.thresholds import AuditConfig

Share = Annotated[float, Field(gt=0, lt=1)]
Exponent = Annotated[float, Field(ge=0, le=1)]
Patterns = tuple[Text, ...]

# At the start of an answer, since an answer may well quote a refusal further down.
REFUSALS = (
    r"(?i)^\W*(i['’]?m |i am )?(very |really |so )?(sorry|afraid|apologi[sz]e)\b.{0,60}\b"
    r"(can['’]?t|cannot|can not|unable|not able|won['’]?t|not allowed)\b",
    r"(?i)^\W*i (can['’]?t|cannot|can not|won['’]?t|am unable to|am not able to)"
    r" (help|assist|comply|do that|provide|discuss|answer|fulfil)",
    r"(?i)^\W*as an (ai|artificial intelligence)( language)?( model)?,? (i|my).{0,40}"
    r"\b(can['’]?t|cannot|unable|not able|don['’]?t)\b",
)
ERRORS = (
    r"(?i)^\W*(error|exception|internal server error|bad gateway|service unavailable|gateway time-?out"
    r"|too many requests|rate limit exceeded|request timed out|null|undefined|\[object object\])\W*$",
    r"(?i)^\W*(error|exception|http)\W{1,3}(code\W{1,3})?[45]\d\d\b",
    r"^Traceback \(most recent call last\):",
    r"(?i)^\W*(an |some )?(unexpected |internal |unknown )?(error|problem) (has )?occurred\b",
    r'(?i)^\s*\{\s*"error"\s*:',
)
TRUNCATED = (r"(?i)(\[truncated\]|\[cut off\]|<\|?truncated\|?>|\[max(imum)? (length|tokens) reached\])\s*$",)


# Words of a duel's winner. 0, 1 and 2 mean one thing here and another there: a log says what they mean to it.
A_WINS = ("a", "model_a", "answer_a", "response_a", "assistant_a", "left", "first")
B_WINS = ("b", "model_b", "answer_b", "response_b", "assistant_b", "right", "second")
TIE = ("tie", "tied", "draw", "equal", "same")
BOTH_GOOD = ("both_good", "bothgood", "tie (bothgood)", "tie (both good)")
BOTH_BAD = ("both_bad", "bothbad", "tie (bothbad)", "tie (both bad)")


def folder_of(setting: str) -> Path:
    """The folder that a setting names, whole: DuckDB would read a `~` at the start of a path in its own way."""
    return Path(setting).expanduser().resolve()


class InputConfig(Section):
    """The log's files."""

    files: Paths = Field(
        description="files, globs or folders of JSONL, JSON, CSV, Parquet and SQLite; text may be gzipped"
    )
    preset: Text | None = Field(
        None,
        description="an application whose export this is (docs/formats.md): it fills in columns and more, and what "
        "this config says itself wins",
    )
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "sqlite"] = Field(
        "auto", description="auto: by the ending of each file's name; .json: by how it begins, too"
    )
    rows: Text | None = Field(
        None, description="JSON: a pointer to the list of rows in a document, as in /data/feedback; null: its elements"
    )
    encoding: Text = Field(
        "auto", description="of all text files; auto: UTF-8, or what a byte order mark says; else a name such as cp1252"
    )
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = Field(",", description="between CSV's fields")
    table: str | None = Field(None, description="SQLite's table or view; null: the only one there is")
    query: Text | None = Field(None, description="SQLite: one SELECT in place of a table, where several hold the log")
    max_row_mebibytes: Positive = Field(16, description="a longer row is a bad one")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="a row that cannot be read: stop and name it, or count it"
    )
    ignore: tuple[Text, ...] = Field(
        (), description="keys that look as if they belonged, such as tools, and are meant to be left out"
    )
    state: str | None = Field(
        None,
        description="folder that keeps what was read, by content: later runs read new files only and go over "
        "everything; a text file that grew, also if a rotation then renamed it (app.jsonl to app-0131.jsonl), and a "
        "Parquet or SQLite file that changed replace what they were, so new days get new files; files of equal bytes "
        "in one run are as many deliveries; null: each run reads `files` alone",
    )

    @model_validator(mode="after")
    def _one_place_of_rows(self) -> "InputConfig":
        if self.table is not None and self.query is not None:
            raise ValueError(f"table ({self.table}) and query are both given: a query names its tables itself")
        if self.rows is not None and not self.rows.startswith("/"):
            raise ValueError(f"rows ({self.rows}) must be a pointer: /{self.rows}")
        return self


class LabelsConfig(Section):
    """What the feedback means. Case, spaces, hyphens and skin tones make no difference to words."""

    up: tuple[Text, ...] = Field(UP, description="words and numbers that mean thumbs up")
    down: tuple[Text, ...] = Field(DOWN, description="words and numbers that mean thumbs down")
    neutral: tuple[Text, ...] = Field(
        (),
        description="words that mean neither, also where the built-in lists say else; such votes are counted and left"
        " out",
    )
    up_from: float | None = Field(None, description="ratings: this and more is thumbs up")
    down_to: float | None = Field(None, description="ratings: this and less is thumbs down; between lies the dead zone")
    a_wins: tuple[Text, ...] = Field(A_WINS, description="duels: words of columns.winner for answer_a")
    b_wins: tuple[Text, ...] = Field(B_WINS, description="duels: words for answer_b")
    tie: tuple[Text, ...] = Field(TIE, description="duels: words for neither, which says nothing of how good they are")
    both_good: tuple[Text, ...] = Field(BOTH_GOOD, description="duels: words for two thumbs up")
    both_bad: tuple[Text, ...] = Field(BOTH_BAD, description="duels: words for two thumbs down")
    unknown: Literal["error", "ignore"] = Field(
        "error", description="a word of no table: stop and list them, or count them like neutral ones"
    )
    ranked: Literal["ends", "halves"] = Field(
        "ends", description="rankings: only best and worst are labelled, or each half; a middle one never is"
    )

    @model_validator(mode="before")
    @classmethod
    def _neutral_words_leave_the_built_in_lists(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("neutral"), list | tuple):
            return tree
        said = {plain(str(word)) for word in tree["neutral"]}
        lists = {"up": UP, "down": DOWN}
        return {name: tuple(word for word in words if plain(word) not in said) for name, words in lists.items()} | tree

    @model_validator(mode="after")
    def _words_have_one_meaning(self) -> "LabelsConfig":
        winners = ("a_wins", "b_wins", "tie", "both_good", "both_bad")
        for one, other in (*itertools.combinations(("up", "down", "neutral"), 2), *itertools.combinations(winners, 2)):
            both = {*map(plain, getattr(self, one))} & {*map(plain, getattr(self, other))}
            if both:
                raise ValueError(f"{', '.join(sorted(both))} stands in both {one} and {other}: a word means one thing")
        if (self.up_from is None) != (self.down_to is None):
            raise ValueError("up_from and down_to belong together: give both, or neither")
        if self.up_from is not None and self.down_to is not None and self.down_to >= self.up_from:
            raise ValueError(
                f"down_to ({self.down_to}) must be below up_from ({self.up_from}): a rating means one thing"
            )
        return self


class CleanConfig(Section):
    """Which votes leave, before anyone's taste or agreement is looked at."""

    normalise: bool = Field(
        True, description="texts that differ in white space or in Unicode's spelling of a letter alone are the same"
    )
    ignore_case: bool = Field(False, description="texts that differ in upper and lower case alone are the same")
    exact_duplicates: bool = Field(
        True,
        description="a user's judgement of an answer counts once; without user ids, once a time stamp that"
        " is finer than a day",
    )
    last_vote_counts: bool = Field(
        True,
        description="where a user judged an answer both ways, only the last time counts; not in"
        " pairs and rankings, where an answer can be better than one and worse than another",
    )
    empty: bool = Field(True, description="leave out empty answers (votes on empty prompts are always left out)")
    errors: Patterns = Field(ERRORS, description="answers that match are error messages; []: keep them")
    refusals: Patterns = Field(REFUSALS, description="answers that match are refusals; []: keep them")
    truncated: Patterns = Field(TRUNCATED, description="answers that match were cut off; []: keep them")
    truncated_finish: tuple[Text, ...] = Field(
        ("length", "max_tokens"), description="values of columns.finish that mean a cut answer; []: keep them"
    )
    scripts: tuple[Text, ...] = Field(
        (), description="scripts of which an answer's letters must be, such as Latin, Cyrillic, Han; []: any"
    )
    min_script_share: Share = Field(0.7, description="least share of an answer's letters in `scripts`")
    languages: tuple[Text, ...] = Field(
        (), description="languages of which an answer must be, as ISO 639-1 codes such as en, de, zh; []: any"
    )
    min_language_probability: Share = Field(
        0.8,
        description="an answer leaves when it is of another language with at least this probability; single words "
        "and numbers reach it for no language, and fenced code is cut first",
    )
    min_characters: Annotated[int, Field(ge=0)] = Field(0, description="of an answer")
    max_characters: Positive | None = Field(None, description="of an answer")
    near_duplicates: Share | None = Field(
        0.85,
        description="answers whose 8-byte shingles have this Jaccard similarity are the same, and only the one "
        "with the most votes stays; null: keep all",
    )
    near_duplicate_scope: Literal["prompt", "log"] = Field(
        "prompt", description="compare the answers to one prompt, or all of the log"
    )

    @model_validator(mode="after")
    def _lengths_leave_room(self) -> "CleanConfig":
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"max_characters ({self.max_characters}) must be at least min_characters ({self.min_characters})"
            )
        return self


class UsersConfig(Section):
    """Whose taste. A kept vote of user u for class y weighs volume(u) * bias(u, y): see "How users are weighed" in
    docs/mining.md."""

    hash_ids: bool = Field(True, description="outputs carry salted hashes in place of user ids")
    salt: str | None = Field(
        None,
        description="null: the environment's KTO_FEEDBACK_SALT, else one that is made once and kept in resources.work",
    )
    max_votes: Positive | None = Field(None, description="most votes of a user; a hash decides which ones stay")
    volume: Exponent = Field(
        0.5, description="exponent of (fair_votes / votes of the user) for users above fair_votes; 0: off"
    )
    fair_votes: Positive | None = Field(None, description="votes that weigh fully; null: the median of all users")
    bias: Exponent = Field(
        1.0, description="exponent of (everyone's share of a class / the user's share of it) where below 1; 0: off"
    )
    prior_votes: NonNegativeFloat = Field(
        10.0, description="votes at everyone's rate that each user's share is smoothed with"
    )


class AgreementConfig(Section):
    """The same answer judged both ways."""

    conflicts: Literal["majority", "drop", "keep", "soft"] = Field(
        "majority",
        description="the majority's label if it is clear; or drop; or keep, weighed by the margin; or soft: the label "
        "is the share of thumbs up among the votes' weights, which training reads with data.soft_labels",
    )
    min_votes: Annotated[int, Field(ge=2)] = Field(3, description="majority: fewer votes are not clear")
    min_margin: Annotated[float, Field(ge=0, le=1)] = Field(
        0.3, description="majority: |up - down| / (up + down) of the votes' weights; less is not clear"
    )


class BalanceConfig(Section):
    """The ratio of the classes."""

    target_up_share: Share | None = Field(
        None, description="share of thumbs up to sample to, by leaving out rows of the larger class; null: keep all"
    )
    deployment_up_share: Share | None = Field(
        None, description="share of thumbs up that is expected in deployment, for the report to compare with"
    )


class SplitConfig(Section):
    """Which prompts are held out: a hash of the prompt alone decides, so that no growth of the log moves one."""

    heldout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="share of the prompts")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="another seed draws other prompts")
    stratify: bool = Field(
        True,
        description="leave out held-out rows of the class of which chance held out more, so that the classes stand as "
        "in training; not with balance.target_up_share, which both splits reach",
    )


class OutputConfig(Section):
    """What is written."""

    folder: Text = Field("runs/mined", description="gets train.parquet, heldout.parquet, audit.json and report.html")
    form: Literal["messages", "text"] = Field(
        "messages", description="prompts and completions as chat messages, or as the text that the log has"
    )


class ResourcesConfig(Section):
    """What a run may use."""

    memory_mebibytes: Annotated[int, Field(ge=256)] | None = Field(
        None, description="memory of the database, which spills to disk beyond it; null: half of the machine's"
    )
    threads: Positive | None = Field(None, description="null: one a core")
    work: Text = Field("runs/feedback", description="folder for the database while it runs, and for the salt")


class MiningConfig(Section):
    """One mining run. `MiningConfig.load` reads it from YAML; `MiningConfig(**sections)` builds it in Python."""

    input: InputConfig
    columns: ColumnsConfig
    turns: TurnsConfig = TurnsConfig()
    roles: RolesConfig = RolesConfig()
    where: WhereConfig = WhereConfig()
    labels: LabelsConfig = LabelsConfig()
    clean: CleanConfig = CleanConfig()
    users: UsersConfig = UsersConfig()
    agreement: AgreementConfig = AgreementConfig()
    balance: BalanceConfig = BalanceConfig()
    split: SplitConfig = SplitConfig()
    output: OutputConfig = OutputConfig()
    audit: AuditConfig = AuditConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="before")
    @classmethod
    def _preset_below(cls, tree: Any) -> Any:
        given = tree.get("input") if isinstance(tree, dict) else None
        name = given.get("preset") if isinstance(given, dict) else getattr(given, "preset", None)
        return tree if name is None else laid_over(preset(name), tree)

    @model_validator(mode="after")
    def _sections_agree(self) -> "MiningConfig":
        if self.output.form == "text" and self.columns.prompt is None:
            raise ValueError(
                "output.form (text) needs columns.prompt: a conversation has no text without a chat template; "
                "use messages"
            )
        if self.output.form == "text" and self.columns.system is not None:
            raise ValueError(
                f"output.form (text) has no place for columns.system ({self.columns.system}): use messages, or put it "
                "before the prompt's text in the log"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "MiningConfig":
        """Reads a YAML file and applies `section.key=value` overrides. Raises `UserError`."""
        return resolve(path, overrides, kind=cls)[0]
