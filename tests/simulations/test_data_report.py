"""The report counts what a naive reader counts, and shows the loss mask where it is."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from client.user_data import Encoder, Record, User, split
from common.errors import DataError
from simulations.data_report import render_report, report_data, report_of, show_report
from simulations.worlds.loaders import load_users

SHARED = Path(__file__).parents[2].parent / "shared"
STORIES = SHARED / "models" / "stories3M"


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word and per line end, so that every count can be done by hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "one", "two", "\n", " ", "\x1b", "[31m", "[bold]"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    breaks = [pre_tokenizers.Split(letter, "isolated") for letter in ("\n", " ", "\x1b")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(breaks)
    backend.decoder = decoders.Fuse()
    names = {"eos_token": "</s>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def rendered(report, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(render_report(report))
    return out.getvalue()


def test_every_count_is_what_can_be_counted_by_hand(tokenizer):
    people = {
        "a": [Record("", "one"), Record("", "one two one"), Record("one", "two", time=3.0), Record("one", "")],
        "b": [Record("one", "two", time=1.0)],
    }
    report = report_data(load_users(people), tokenizer, max_tokens=4)
    assert (report.users, report.records, report.dropped) == (2, 5, 2)  # nothing predicts the only token of "one"
    assert report.users_too_little == {"1 usable records, too few for three parts": 1}
    assert (report.users_by_time, report.tasks) == (1, {"text": 5})
    assert (report.train, report.validation, report.test) == (1, 1, 1)
    # "one two one" is 5 words and spaces; "one \n | two eos" is 4
    assert report.tokens == {10: 4, 50: 4, 90: 5, 99: 5, 100: 5}
    assert report.records_per_user == {10: 1, 50: 1, 90: 4, 99: 4, 100: 4}
    assert (report.truncated, report.responses_cut) == (1, 1)
    assert report.labels == 3 + 2 + 2
    assert not report.chat_template


def test_the_shown_record_is_split_where_the_loss_begins(tokenizer):
    report = report_data(load_users({"a": [Record("one two", "two one")]}), tokenizer, 64)
    assert report.shown is not None
    assert (report.shown.context, report.shown.labels) == ("one two\n", "two one</s>")
    assert (report.shown.context_tokens, report.shown.label_tokens) == (4, 4)
    text = rendered(report)
    assert "  | one two\n" in text
    assert "  > two one</s>\n" in text


def test_what_could_steer_a_terminal_is_shown_by_its_code(tokenizer):
    report = report_data(load_users({"a": [Record("one \x1b", "[bold] \x1b[31m two")]}), tokenizer, 64)
    text = rendered(report)
    assert r"> [bold] \x1b" in text
    assert "\x1b[31m two" not in text


def test_the_json_has_no_text_and_no_user_id_in_it(tokenizer):
    report = report_data(load_users({"alice": [Record("one two", "two one")] * 3}), tokenizer, 64)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["tokens"] == {"p10": 8, "p50": 8, "p90": 8, "p99": 8, "max": 8}
    for content in ("one two", "two one", "alice"):
        assert content not in text


def test_a_source_with_nothing_to_learn_is_reported_all_the_same(tokenizer):
    report = report_data(load_users({"a": [Record("one", " ")]}), tokenizer, 64)
    assert (report.dropped, report.tokens, report.shown) == (1, {}, None)
    assert "dropped, nothing to learn" in rendered(report)


def test_what_the_reader_left_out_is_in_the_report(tokenizer, tmp_path):
    path = tmp_path / "test_questions.json"
    item = {"id": "1", "text": "one", "title": "two"}
    path.write_text(json.dumps([{"id": "1", "input": "Generate a headline: one", "profile": [item]}]))
    report = report_data(load_users(path), tokenizer, 64)
    assert report.notes == {"queries without an answer": 1}
    assert "left out: queries without an answer" in rendered(report)


def test_a_long_record_is_not_shown_whole(tokenizer):
    report = report_data(load_users({"a": [Record("", "one two " * 5000)]}), tokenizer, 100_000)
    text = rendered(report)
    assert "characters in all" in text
    assert len(text) < 8000


def test_a_user_is_counted_once_over_batches(tokenizer, monkeypatch):
    monkeypatch.setattr("simulations.data_report.USERS_AT_ONCE", 2)
    people = [User(str(number), (Record("one", "two"),) * (number + 1)) for number in range(5)]
    report = report_data(load_users(people), tokenizer, 64)
    assert (report.users, report.records) == (5, 15)
    assert sum(report.users_too_little.values()) == 2


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models are not here")
def test_on_real_data_the_percentiles_are_those_of_the_sorted_lengths():
    from transformers import PreTrainedTokenizerFast

    stories = PreTrainedTokenizerFast.from_pretrained(STORIES)
    source = load_users(SHARED / "data" / "shakespeare_roles.jsonl", limit=40)
    report = report_data(source, stories, 64)
    texts = [record.response for user in source for record in user.records]
    lengths = sorted(len(ids) for ids in stories(texts, verbose=False)["input_ids"])
    for percent, value in report.tokens.items():
        assert value == lengths[max(0, math.ceil(percent / 100 * len(lengths)) - 1)]
    assert report.truncated == sum(length > 64 for length in lengths)
    assert report.labels == sum(min(length, 64) - 1 for length in lengths)
    parts = [split(user) for user in source]
    assert report.train == sum(len(part.train) for part in parts)
    shown = Encoder(stories, 64).encode(next(iter(source)).records[0])
    assert shown is not None
    assert report.shown is not None
    assert report.shown.labels == stories.decode(shown.ids[1:].tolist())
    assert isinstance(render_report(report).renderables[-1], Text)


def test_the_built_in_world_is_reported_with_the_tokenizer_of_the_built_in_model():
    report = report_of("built-in", max_tokens=64, users=20)
    assert (report.name, report.users) == ("the built-in world", 20)
    assert report.chat_template
    assert report.users_by_time == 20
    assert report.train > report.test > 0
    out = io.StringIO()
    show_report(report, Console(file=out, width=100))
    assert "SHA-256" in out.getvalue()


def test_a_folder_without_a_tokenizer_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(DataError, match="no tokenizer that can be opened"):
        report_of("built-in", model=str(tmp_path), max_tokens=64, users=1)
    with pytest.raises(DataError, match="no such file or folder"):
        report_of(str(tmp_path / "no.jsonl"), max_tokens=64)
