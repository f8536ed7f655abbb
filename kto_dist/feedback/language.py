"""Which language an answer is in, by py3langid's naive Bayes over byte n-grams (Lui and Baldwin, 2012).

In:  the answers that still have votes, and their texts in `parts`.
Out: `other_languages` (response_key): answers that are of none of the wanted languages, with a stated probability.

Probabilities are those of the library, which it tempers by the text's length: a few words, numbers and code get a low
one for every language, and stay. Only an answer's start is read, which tells as much as the rest of it.
"""

from functools import cache

import duckdb
import pyarrow as pa
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from kto_dist.errors import UserError

_READ = 1000  # characters; some 10,000 such answers a second and core
_TEXTS = 2048


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_languages(languages: tuple[str, ...]) -> None:
    """Raises `UserError` for a code that the model does not know."""
    known = set(_identifier().labels) if languages else set()
    for language in languages:
        if language not in known:
            codes = ", ".join(sorted(code for code in known if len(code) == 2))
            raise UserError(f"clean.languages ({language}) is no language that can be told apart: use some of {codes}")


def find_other_languages(connection: duckdb.DuckDBPyConnection, languages: tuple[str, ...], least: float) -> None:
    """Makes `other_languages`."""
    identifier, wanted = _identifier(), set(languages)
    connection.execute("CREATE TABLE other_languages (response_key UUID)")
    reader = (
        connection.cursor()
        .sql(
            f"""SELECT r.response_key::VARCHAR AS response_key, left(completion, {_READ}) AS text
            FROM parts JOIN responses r ON parts.vote = r.representative
            WHERE r.response_key IN (SELECT response_key FROM ballots WHERE removed IS NULL)"""
        )
        .to_arrow_reader(_TEXTS)
    )
    for batch in reader:
        found = [identifier.classify(text) for text in batch.column("text").to_pylist()]
        others = [language not in wanted and probability >= least for language, probability in found]
        if any(others):
            leaving = pa.table({"response_key": batch.column("response_key").filter(pa.array(others))})
            connection.register("batch", leaving)
            connection.execute("INSERT INTO other_languages SELECT response_key::UUID FROM batch")
            connection.unregister("batch")
