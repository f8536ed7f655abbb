"""Which language an answer is in (base/languages.py), and the answers that are of none of the wanted ones.

In:  the answers that still have votes, and their texts in `parts`.
Out: `other_languages` (response_key): answers that are of none of the wanted languages, with a stated probability.

What the library calls `zxx`, no linguistic content (long lists of numbers, hexadecimal digests), stays, as does an
answer of which nothing but fenced code is left. A word or a number gets a low probability for every language and stays,
but a short sentence of usual words is told with confidence ("Thank you very much!": en 0.94). Code that no fence marks
reads as English from some lines on, by its keywords and comments.
"""

import duckdb
import pyarrow as pa

from kto_dist.base.errors import UserError
from kto_dist.base.languages import FENCED, NONE, READ, identifier

_TEXTS = 2048


def check_languages(languages: tuple[str, ...]) -> None:
    """Raises `UserError` for a code that the model does not know."""
    known = set(identifier().labels) - {NONE} if languages else set()
    for language in languages:
        if language not in known:
            codes = ", ".join(sorted(known, key=lambda code: (len(code), code)))
            raise UserError(f"clean.languages ({language}) is no language that can be told apart: use some of {codes}")


def find_other_languages(connection: duckdb.DuckDBPyConnection, languages: tuple[str, ...], least: float) -> None:
    """Makes `other_languages`."""
    classify, staying = identifier().classify, {*languages, NONE}
    connection.execute("CREATE TABLE other_languages (response_key UUID)")
    reader = (
        connection.cursor()
        .sql(
            f"""SELECT r.response_key::VARCHAR AS response_key,
                left(trim(regexp_replace(completion, '{FENCED}', ' ', 'g')), {READ}) AS text
            FROM parts JOIN responses r ON parts.vote = r.representative
            WHERE r.response_key IN (SELECT response_key FROM ballots WHERE removed IS NULL)"""
        )
        .to_arrow_reader(_TEXTS)
    )
    for batch in reader:
        found = [classify(text) for text in batch.column("text").to_pylist()]
        others = [language not in staying and probability >= least for language, probability in found]
        if any(others):
            leaving = pa.table({"response_key": batch.column("response_key").filter(pa.array(others))})
            connection.register("batch", leaving)
            connection.execute("INSERT INTO other_languages SELECT response_key::UUID FROM batch")
            connection.unregister("batch")
