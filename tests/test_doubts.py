"""A mapping whose rows say that it would be read wrongly is refused, in training as in mining."""

import pyarrow as pa
import pyarrow.parquet
import pytest
from mining import mined, rows_of, write_log
from thumbs_logs import content, read, write

from kto_dist.base.errors import UserError
from kto_dist.base.label_names import opposite_of, trouble, trouble_of_two
from kto_dist.data.formats import BadRows

TEXT = {"prompt": "why?", "completion": "because"}
ASKED, SAID = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}
AGAIN, LAST = {"role": "user", "content": "and then?"}, {"role": "assistant", "content": "nothing"}


def refused_by_training(path, *rows, columns=None):
    with pytest.raises(UserError) as found:
        read(write(path / "log.jsonl", *rows), columns=columns)
    return str(found.value)


def refused_by_mining(folder, rows, columns, **sections):
    with pytest.raises(UserError) as found, mined(folder, rows, columns, **sections):
        pass
    return str(found.value)


@pytest.mark.parametrize("name", ["thumbs_down", "isDisliked", "flagged", "toxicity", "has_error", "was-wrong", "BAD"])
def test_a_column_named_for_what_is_bad_is_no_thumbs_up(name):
    assert all(trouble(name, value, {}).kind == "sense" for value in (True, 1, "1", "yes", 0.0))
    # words say themselves what they mean
    assert trouble(name, "good", {}) is None and trouble(name, None, {}) is None


@pytest.mark.parametrize("name", ["label", "thumb", "not_toxic", "up_or_down", "is_good", "error_free", "feedback"])
def test_other_names_say_nothing_against_their_values(name):
    assert trouble(name, 1, {"comment": "downvoted"}) is None


@pytest.mark.parametrize(
    ("name", "other"),
    [("thumbs_up", "thumbs_down"), ("numLikes", "numDislikes"), ("UPVOTES", "DOWNVOTES"), ("votes.up", "votes.down")],
)
def test_of_one_side_of_two_a_zero_may_mean_no_vote(name, other):
    assert opposite_of(name) == other and opposite_of("label") is None
    assert trouble(name, 0, {name: 0, other: 0}).kind == "opposite" and trouble(name, 0, {name: 0}) is None


def test_numbers_of_answers_say_nothing_of_which_is_better():
    assert all(trouble_of_two(name, 1) for name in ("better_response_id", "choice", "winner", "preference_strength"))
    assert not any(trouble_of_two(name, 1) for name in ("label", "labels", "a_is_preferred"))
    assert trouble_of_two("choice", "true") is None or trouble_of_two("choice", True) is None


@pytest.mark.parametrize(
    ("name", "beside", "said"),
    [
        ("toxicity", {}, "how bad an answer was"),
        ("rank", {}, "of ranks the lowest is the best"),
        ("quality", {"quality-metadata": {"class-name": "good"}}, "class-name in quality-metadata has the word"),
    ],
)
def test_training_and_mining_refuse_labels_that_their_columns_speak_against(tmp_path, name, beside, said):
    row = {**TEXT, name: 0, **beside}
    assert said in refused_by_training(tmp_path, row, columns={"label": name})
    columns = {"prompt": "prompt", "response": "completion", "feedback": name}
    assert said in refused_by_mining(tmp_path, [row], columns)
    if not isinstance(next(iter(beside.values()), None), dict):
        pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "log.parquet")
        assert said in refused_by_mining(tmp_path, tmp_path / "log.parquet", columns)
        with pytest.raises(UserError, match="write one column"):
            read(tmp_path / "log.parquet", columns={"label": name})


def test_of_columns_for_thumbs_up_and_down_a_row_has_to_say_one_of_the_two(tmp_path):
    rows = [{**TEXT, "thumbs_up": up, "thumbs_down": down} for up, down in ((1, 0), (0, 1), (0, 0), (1, 1))]
    columns = {"label": "thumbs_up"}
    assert [row.desirable for row in read(write(tmp_path / "log.jsonl", *rows[:2]), columns=columns)] == [True, False]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    for log in (write(tmp_path / "log.jsonl", *rows), tmp_path / "log.parquet"):
        bad = BadRows()
        assert len(read(log, columns=columns, on_bad_row="skip", bad=bad)) == 2 and bad.counts == {"no vote": 2}
    # which rows mining will meet it does not know when it begins
    columns = {"prompt": "prompt", "response": "completion", "feedback": "thumbs_up"}
    assert "thumbs_down stands beside it" in refused_by_mining(tmp_path, rows[:2], columns)


def test_mining_takes_what_the_config_says_of_the_words(tmp_path):
    rows = [{"q": "why?", "a": f"answer {i}", "flagged": i % 2} for i in range(2)]
    columns = {"prompt": "q", "response": "a", "feedback": "flagged"}
    with mined(tmp_path, rows, columns, labels__up=["0"], labels__down=["1"]) as connection:
        assert rows_of(connection) == [("why?", "answer 0", True), ("why?", "answer 1", False)]


def test_the_number_of_the_better_answer_is_no_label_of_two(tmp_path):
    row = {"prompt": "why?", "response_0": "a", "response_1": "b", "better_response_id": 0}
    columns = {"output_A": "response_0", "output_B": "response_1", "label": "better_response_id"}
    assert "numbers the answers" in refused_by_training(tmp_path, row, columns=columns)
    # 1 where A is better, by another name
    log = write(tmp_path / "log.jsonl", {**row, "a_wins": 1})
    assert [desirable for *_, desirable, _ in content(read(log, columns=columns | {"label": "a_wins"}))] == [
        True,
        False,
    ]


def test_a_winner_of_one_outcome_among_several_is_refused(tmp_path):
    row = {"q": "why?", "x": "a", "y": "b", "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}
    columns = {"prompt": "q", "answer_a": "x", "answer_b": "y", "winner": "winner_model_a"}
    said = refused_by_mining(tmp_path, [row], columns, labels__a_wins=["1"], labels__b_wins=["0"])
    assert "winner_model_b, winner_tie" in said and "input.ignore" in said


def test_one_of_several_votes_is_not_taken_by_its_place(tmp_path):
    one, two = [{"v": 1, "by": "x"}], [{"v": 1, "by": "x"}, {"v": 0, "by": "y"}]
    columns = {"label": "/votes/0/v"}
    assert "by its place" in refused_by_training(tmp_path, {**TEXT, "votes": two}, columns=columns)
    assert len(read(write(tmp_path / "log.jsonl", {**TEXT, "votes": one}), columns=columns)) == 1


def test_responses_that_were_not_submitted_are_no_votes(tmp_path):
    row = {**TEXT, "quality.responses": ["good", "bad"], "quality.responses.status": ["submitted", "discarded"]}
    columns = {"prompt": "prompt", "response": "completion", "feedback": "/quality.responses[]"}
    assert "not all of its responses were submitted" in refused_by_mining(tmp_path, [row], columns)
    said = refused_by_training(tmp_path, row, columns={"label": "/quality.responses/0"})
    assert "not all of its responses were submitted" in said


@pytest.mark.parametrize("beside", [{"message_index": 1}, {"message_id": "m"}])
def test_training_refuses_a_conversation_of_which_another_turn_was_rated(tmp_path, beside):
    row = {"messages": [ASKED, {**SAID, "id": "m"}, AGAIN, {**LAST, "id": "n"}], "label": True}
    assert "names another turn" in refused_by_training(tmp_path, {**row, **beside})
    last = {"message_index": 3} if "message_index" in beside else {"message_id": "n"}
    assert len(read(write(tmp_path / "log.jsonl", {**row, **last}))) == 1
    [name] = beside
    assert len(read(write(tmp_path / "log.jsonl", {**row, **beside}), columns={name: None})) == 1


def test_ids_of_turns_may_be_anything(tmp_path):
    oid = {"$oid": "64"}  # as MongoDB exports them
    row = {"messages": [ASKED, {**SAID, "id": oid}, AGAIN, {**LAST, "id": oid}], "label": True, "message_id": "n"}
    assert len(read(write(tmp_path / "log.jsonl", row))) == 1


def test_mining_asks_which_turn_a_number_beside_a_conversation_means(tmp_path):
    """As Gradio's chat writes it."""
    rows = [{"talk": [ASKED, SAID, AGAIN, LAST], "index": place, "v": "Like"} for place in (1, 3)]
    columns = {"messages": "talk", "feedback": "v"}
    assert "map columns.rated_index: index" in refused_by_mining(tmp_path, rows, columns)
    with mined(tmp_path, rows, columns | {"rated_index": "index"}) as connection:
        assert {completion for _, completion, _ in rows_of(connection)} == {"nothing", "because"}
    # numbers of rows point at questions as well
    numbered = [{**row, "index": place} for place, row in enumerate(rows)]
    with mined(tmp_path, numbered, columns) as connection:
        assert {completion for _, completion, _ in rows_of(connection)} == {"nothing"}


def test_a_winner_beside_chosen_and_rejected_is_not_passed_over(tmp_path):
    row = {"prompt": "why?", "chosen": "a", "rejected": "b", "winner": "rejected"}
    assert "two may say different things" in refused_by_training(tmp_path, row)
    assert len(read(write(tmp_path / "log.jsonl", {**row, "winner": "chosen"}))) == 2
    assert len(read(write(tmp_path / "log.jsonl", row), columns={"winner": None})) == 2


def test_a_conversation_of_another_form_beside_whole_conversations_may_be_left_out(tmp_path):
    """As distilabel writes it."""
    row = {"conversation": [{"input": "why?", "output": "hm"}], "chosen": [ASKED, SAID], "rejected": [ASKED, LAST]}
    assert "data.columns: {conversation: null}" in refused_by_training(tmp_path, row)
    assert len(read(tmp_path / "log.jsonl", columns={"conversation": None})) == 2


def test_what_an_annotator_says_of_a_label_is_not_passed_over(tmp_path):
    """As Prodigy writes it."""
    row = {"prompt": "why?", "response": "because", "label": "good", "answer": "reject"}
    assert "what an annotator said" in refused_by_training(tmp_path, row)
    assert not read(write(tmp_path / "log.jsonl", row), columns={"label": "answer"})[0].desirable
    columns = {"prompt": "prompt", "response": "response", "feedback": "label"}
    assert "map columns.feedback: answer" in refused_by_mining(tmp_path, [row], columns)
    # the right answer to a question is no verdict
    assert len(read(write(tmp_path / "log.jsonl", {**row, "answer": "42"}))) == 1


def test_turns_as_pairs_of_role_and_text_are_no_questions_and_answers(tmp_path):
    """As FastChat logs them."""
    talk = [["USER", "why?"], ["ASSISTANT", "because"], ["USER", "and then?"], ["ASSISTANT", "nothing"]]
    rows = [{"state": {"messages": talk[:count]}, "type": kind} for count, kind in ((2, "upvote"), (4, "downvote"))]
    with mined(tmp_path, rows, {"messages": "/state/messages", "feedback": "type"}) as connection:
        found = rows_of(connection)
    assert ("why?", "because", True) in found and len(found) == 2
    [turns] = [prompt for prompt, said, _ in found if said == "nothing"]
    assert turns == (("user", "why?"), ("assistant", "because"), ("user", "and then?"))


def test_a_tree_of_turns_is_read_by_one_thread(tmp_path):
    """DuckDB 2.0 waits for ever where a recursion reads Parquet and nothing else runs."""
    turns = [("1", None, "user", "why?", None), ("2", "1", "assistant", "because", "up")]
    rows = [dict(zip(("i", "p", "r", "x", "f"), turn, strict=True)) for turn in turns]
    columns = {"role": "r", "text": "x", "id": "i", "parent": "p", "feedback": "f"}
    log = write_log(tmp_path / "log.jsonl", rows)
    with mined(tmp_path, log, columns, resources__threads=1) as connection:
        assert rows_of(connection) == [("why?", "because", True)]
