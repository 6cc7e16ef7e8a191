"""Every source that users are read from, its quirks, and what is said when it is broken."""

import gzip
import hashlib
import json
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.user_data import HELD_OUT, Record, User, split
from common.errors import DataError
from simulations.worlds.files import digest_of, read_entries
from simulations.worlds.loaders import load_users, subject_key

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"

CONTENT = "Alice's secret"


def write_lines(path, *entries):
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def message_of(source, **options):
    """The error of reading `source`, checked to hold nothing of the content."""
    with pytest.raises(DataError) as caught:
        list(load_users(source, **options))
    assert CONTENT not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def responses(user):
    return [record.response for record in user.records]


# ---- a user per line


@pytest.mark.parametrize("name", ["users.jsonl", "users.ndjson", "users.jsonl.gz", "users.json"])
def test_the_three_shapes_are_read_from_lines(tmp_path, name):
    path = write_lines(
        tmp_path / name,
        {"user": "a", "texts": ["one", "two"], "times": [1, "1970-01-01T00:00:02Z"]},
        {
            "user": "b",
            "examples": [{"prompt": "p", "response": "r", "time": "1970-01-02"}],
            "profile": ["likes", "tea"],
        },
        {"user": 3, "pairs": [{"prompt": "p", "chosen": "yes", "rejected": "no"}], "profile": "likes tea"},
    )
    assert list(load_users(path)) == [
        User("a", (Record("", "one", 1.0), Record("", "two", 2.0))),
        User("b", (Record("p", "r", 86400.0, "reply"),), ("likes", "tea")),
        User("3", (Record("p", "yes", None, "preference", "no"),), ("likes tea",)),
    ]


def test_an_array_of_users_is_read_too(tmp_path):
    path = tmp_path / "users.json"
    path.write_text(json.dumps([{"user": "a", "texts": ["one"]}, {"user": "b", "texts": ["two"]}], indent=2))
    assert [user.id for user in load_users(path)] == ["a", "b"]


def test_a_limit_stops_reading_before_what_is_broken_later(tmp_path):
    path = write_lines(tmp_path / "users.jsonl", {"user": "a", "texts": ["one"]}, "not a user")
    assert [user.id for user in load_users(path, limit=1)] == ["a"]
    assert [user.id for user in load_users(load_users(path), limit=1)] == ["a"]
    assert list(load_users(path, limit=0)) == []


def test_users_are_streamed(tmp_path):
    path = write_lines(tmp_path / "users.jsonl", *({"user": str(n), "texts": ["x" * 5000] * 4} for n in range(400)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in load_users(path)) == 400
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 8
    finally:
        tracemalloc.stop()


def test_a_source_is_read_anew_each_time_and_its_digest_is_that_of_the_file(tmp_path):
    path = write_lines(tmp_path / "users.jsonl", {"user": "a", "texts": ["one"]})
    source = load_users(str(path))
    assert list(source) == list(source)
    assert source.source_digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_digest_of_several_files_depends_on_each_and_on_their_order(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"a")
    two.write_bytes(b"b")
    expected = "".join(hashlib.sha256(part).hexdigest() + "\n" for part in (b"a", b"b"))
    assert digest_of([one, two]) == hashlib.sha256(expected.encode()).hexdigest()
    assert digest_of([two, one]) != digest_of([one, two])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"user": "b", "texts": ["Alice\'s secret"', "line 2: not valid JSON"),
        ('["Alice\'s secret"]', "line 2: not a JSON object"),
        ('{"Alice\'s secret": ["x"]}', "line 2: no user is named"),
        ('{"user": "", "texts": ["x"]}', "line 2: no user is named"),
        ('{"user": ["Alice\'s secret"], "texts": ["x"]}', "line 2: the user's id is neither text nor a whole number"),
        ('{"user": true, "texts": ["x"]}', "line 2: the user's id is neither text nor a whole number"),
        ('{"user": "\\ud800", "texts": ["x"]}', "line 2: the user's id is not valid text"),
        ('{"user": "Alice\'s secret"}', 'line 2: none of "texts", "examples" and "pairs" is there'),
        ('{"user": "Alice\'s secret", "texts": []}', "line 2: a user without records"),
        ('{"user": "b", "texts": "Alice\'s secret"}', "line 2: 'texts' is not a list"),
        ('{"user": "b", "texts": ["x", {"Alice\'s secret": 1}]}', "line 2: item 2 of 'texts' is not a text"),
        ('{"user": "b", "texts": [7]}', "line 2: item 1 of 'texts' is not a text"),
        ('{"user": "b", "examples": ["Alice\'s secret"]}', "line 2: item 1 of 'examples' is not an object with"),
        (
            '{"user": "b", "examples": [{"prompt": "Alice\'s secret"}]}',
            "line 2: item 1 of 'examples': 'response' is not",
        ),
        (
            '{"user": "b", "examples": [{"prompt": 1, "response": "x"}]}',
            "line 2: item 1 of 'examples': 'prompt' is not text",
        ),
        (
            '{"user": "b", "pairs": [{"prompt": "x", "chosen": "x"}]}',
            "line 2: item 1 of 'pairs': 'rejected' is not there",
        ),
        ('{"user": "b", "texts": ["x"], "times": [1, 2]}', "line 2: 'times' is not a list with one time for each"),
        ('{"user": "b", "texts": ["x"], "times": ["Alice\'s secret"]}', "line 2: the time is neither a number nor ISO"),
        ('{"user": "b", "texts": ["x"], "times": [NaN]}', None),
        ('{"user": "b", "texts": ["x"], "times": [Infinity]}', "line 2: the time is neither a finite number nor ISO"),
        ('{"user": "b", "texts": ["x"], "profile": {"Alice\'s secret": 1}}', "line 2: 'profile' is neither text nor"),
        ('{"user": "a", "texts": ["x"]}', "line 2: this user was there before"),
        ("[" * 200_000, "line 2: "),
        ('{"user": ' + "9" * 5000 + ', "texts": ["x"]}', "line 2: a number with too many digits"),
        ('{"user": "b", "texts": ["x"], "times": [' + "9" * 400 + "]}", "line 2: the time is neither a finite number"),
    ],
)
def test_a_broken_line_is_named_by_its_number_and_never_shown(tmp_path, line, expected):
    path = tmp_path / "users.jsonl"
    path.write_text('{"user": "a", "texts": ["x"]}\n' + line + "\n", encoding="utf-8")
    if expected is None:  # a table's way to say that there is none
        assert [user.records[0].time for user in load_users(path)] == [None, None]
        return
    assert f"{path}: {expected}" in message_of(path)


def test_lines_are_counted_with_the_blank_ones(tmp_path):
    path = tmp_path / "users.jsonl"
    path.write_text('\ufeff{"user": "a", "texts": ["x"]}\n\n  \nbroken\n', encoding="utf-8")
    assert f"{path}: line 4: not valid JSON" in message_of(path)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "users.jsonl"
    path.write_bytes(b'{"user": "a", "texts": ["x"]}\n{"user": "b", "texts": ["\xff"]}\n')
    assert message_of(path) == f"{path}: line 2: not UTF-8"


def test_a_torn_gzip_file_is_named(tmp_path):
    path = write_lines(tmp_path / "users.jsonl.gz", *({"user": str(n), "texts": ["x"]} for n in range(99)))
    path.write_bytes(path.read_bytes()[:-20])
    assert message_of(path) == f"{path}: not a whole gzip file"


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.csv"])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).write_text("")
    assert "is empty" in message_of(tmp_path / name)


def test_a_missing_path_and_an_unknown_kind_are_refused_before_reading(tmp_path):
    for source in (tmp_path / "no.jsonl", "no/such.jsonl", "nothing", "a/b/c"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_users(source)
    (tmp_path / "users.docx").write_text("x")
    with pytest.raises(DataError, match=r"of no known kind; known are \.jsonl"):
        load_users(tmp_path / "users.docx")
    with pytest.raises(DataError, match="no data files there"):
        load_users(tmp_path)
    with pytest.raises(DataError, match="cannot be read from a int"):
        load_users(7)


def test_a_file_without_permission_or_that_is_gone_is_an_error_of_ours(tmp_path):
    path = write_lines(tmp_path / "users.jsonl", {"user": "a", "texts": ["x"]})
    source = load_users(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list(source)
    with pytest.raises(DataError, match="cannot be read"):
        _ = source.source_digest


# ---- JSON arrays, read entry by entry


@given(
    st.lists(
        st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.none(), max_size=4), max_size=9
    ),
    st.sampled_from([None, 1, 4]),
    st.booleans(),
)
def test_entries_of_an_array_are_those_that_json_reads_at_once(tmp_path_factory, entries, indent, golds):
    path = tmp_path_factory.mktemp("json") / "entries.json"
    whole = {"task": "LaMP_2", "golds": entries} if golds else entries
    path.write_text(json.dumps(whole, indent=indent, ensure_ascii=indent is None), encoding="utf-8", errors="replace")
    found = json.loads(path.read_text(encoding="utf-8"))
    expected = found["golds"] if golds else found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simulations.worlds.files.CHUNK", 40)
        assert list(read_entries(path)) == list(enumerate(expected, start=1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1}, {"a": ]', "entry 2: not valid JSON"),
        ('[{"a": 1} {"a": 1}]', "after entry 1: not valid JSON"),
        ('[{"a": 1}', "after entry 1: not valid JSON"),
        ('[{"a": 1}, {"a": ' + "9" * 5000 + "}]", "entry 2: a number with too many digits"),
        ('{"a": [1]}', 'neither a JSON array nor an object with an array under "golds"'),
        ("  ", "is empty"),
    ],
)
def test_a_broken_array_is_named_by_its_entry(tmp_path, text, expected):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_entries(path))
    assert str(caught.value) in {f"{path}: {expected}", f"{path} {expected}"}


# ---- LaMP

TAGS = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
    "explanation. tags: [sci-fi, comedy] description:"
)
LAMP = {
    "LaMP_1": (
        'For an author who has written the paper with the title "T", which reference is related? Just answer with [1] '
        'or [2] without explanation. [1]: "r1" [2]: "r2"',
        {"id": "9", "title": "Title", "abstract": "Abstract"},
        ("Write an abstract for this title: Title", "Abstract"),
        "[1]",
    ),
    "LaMP_2": (
        f"{TAGS} A man: a plan",
        {"id": "9", "description": "A ship", "tag": "sci-fi"},
        (f"{TAGS} A ship", "sci-fi"),
        "comedy",
    ),
    "LaMP_2N": (
        "Which category does this article relate to? categories: [travel, women] article: Paris",
        {"id": "9", "title": "Rome", "text": "To Rome", "category": "travel"},
        ("Which category does this article relate to? categories: [travel, women] article: To Rome", "travel"),
        "women",
    ),
    "LaMP_3": (
        "What is the score of the following review on a scale of 1 to 5? just answer. review: Good: very",
        {"id": "9", "text": "Bad", "score": 1},
        ("What is the score of the following review on a scale of 1 to 5? just answer. review: Bad", "1"),
        "5",
    ),
    "LaMP_4": (
        "Generate a headline for the following article: Rain",
        {"id": "9", "title": "Sun!", "text": "The sun"},
        ("Generate a headline for the following article: The sun", "Sun!"),
        "Wet",
    ),
    "LaMP_5": (
        "Generate a title for the following abstract of a paper: We: prove",
        {"id": "9", "title": "On x", "abstract": "We show"},
        ("Generate a title for the following abstract of a paper: We show", "On x"),
        "On y",
    ),
    "LaMP_6": (
        "Generate a subject for the following email: Hi",
        {"id": "9", "title": "Re", "text": "Hello"},
        ("Generate a subject for the following email: Hello", "Re"),
        "Fwd",
    ),
    "LaMP_7": (
        "Paraphrase the following tweet without any explanation before or after it: hi",
        {"id": "9", "text": "one two three four"},
        ("Complete the following tweet: one", "two three four"),
        "hello",
    ),
}


def write_lamp(folder, part, questions, golds=None, task="LaMP_2", as_golds=False):
    path = folder / f"{part}_questions.json"
    path.write_text(json.dumps({"task": task, "golds": questions} if as_golds else questions))
    if golds is not None:
        outputs = {"task": task, "golds": [{"id": name, "output": output} for name, output in golds.items()]}
        (folder / f"{part}_outputs.json").write_text(json.dumps(outputs))
    return path


@pytest.mark.parametrize("as_golds", [False, True], ids=["list", "dict with golds"])
@pytest.mark.parametrize("task", LAMP)
def test_a_lamp_profile_is_trained_on_and_its_query_tested_on(tmp_path, task, as_golds):
    query, item, (prompt, response), gold = LAMP[task]
    questions = [{"id": "200", "input": query, "profile": [item]}]
    path = write_lamp(tmp_path, "dev", questions, {"200": gold}, task=task, as_golds=as_golds)
    (user,) = load_users(path)
    assert user.id == "200"
    assert user.records == (
        Record(prompt, response, None, task),
        Record(query, gold, None, task, kind=HELD_OUT),
    )


def test_the_split_of_a_lamp_user_tests_on_the_query_alone(tmp_path):
    query, item, _, gold = LAMP["LaMP_2"]
    profile = [{**item, "id": str(n), "description": f"film {n}"} for n in range(10)]
    path = write_lamp(tmp_path, "dev", [{"id": "1", "input": query, "profile": profile}], {"1": gold})
    (user,) = load_users(path)
    parts = split(user)
    assert [record.prompt for record in parts.test] == [query]
    assert (len(parts.train), len(parts.validation)) == (8, 2)


def test_lamp_queries_without_a_public_answer_give_their_profile_and_are_counted(tmp_path):
    query, item, (prompt, _), _ = LAMP["LaMP_2"]
    path = write_lamp(
        tmp_path, "test", [{"id": "1", "input": query, "profile": [item]}, {"id": "2", "input": query, "profile": []}]
    )
    source = load_users(path)
    (user,) = source
    assert [record.prompt for record in user.records] == [prompt]
    assert source.notes == {"queries without an answer": 2, "users without a record": 1}


def test_lamps_user_split_has_other_users_in_each_file(tmp_path):
    query, item, _, gold = LAMP["LaMP_2"]
    for part in ("train", "dev"):
        write_lamp(tmp_path, part, [{"id": "1", "input": query, "profile": [item]}], {"1": gold})
    assert [user.id for user in load_users(tmp_path)] == ["train/1", "dev/1"]


def test_lamps_time_split_gathers_a_user_over_queries_and_files(tmp_path):
    query, item, _, _ = LAMP["LaMP_3"]
    stem = query.removesuffix("Good: very")

    def question(name, user, text, *items):
        profile = [{**item, "id": key, "text": f"item {key}", "date": date} for key, date in items]
        return {"id": name, "user_id": user, "input": stem + text, "profile": profile}

    old, older = ("1", "2015-03-01"), ("0", "2015-02-01 10:00:00")
    write_lamp(
        tmp_path,
        "train",
        [question("10", 7, "a", old), question("11", 8, "b", old), question("12", 7, "c", old, older)],
        {"10": "5", "11": "4", "12": "3"},
    )
    write_lamp(tmp_path, "dev", [question("20", 7, "d", older, ("2", "2015-04-01"))], {"20": "2"})
    seven, eight = load_users(tmp_path)
    assert (seven.id, eight.id) == ("7", "8")
    assert [record.prompt.removeprefix(stem) for record in seven.records] == [
        "item 1",
        "item 0",
        "item 2",
        "a",
        "c",
        "d",
    ]
    assert [record.kind for record in seven.records] == [None] * 5 + [HELD_OUT]
    assert seven.records[0].time == datetime(2015, 3, 1, tzinfo=UTC).timestamp()
    assert [record.kind for record in eight.records] == [None, HELD_OUT]


def test_lamp_items_with_dates_stand_in_the_order_of_their_dates(tmp_path):
    query, item, _, gold = LAMP["LaMP_3"]
    profile = [{**item, "id": str(year), "text": f"{year}", "date": f"{year}-01-01"} for year in (2012, 2010, 2011)]
    (user,) = load_users(write_lamp(tmp_path, "dev", [{"id": "1", "input": query, "profile": profile}], {"1": gold}))
    assert [record.prompt[-4:] for record in user.records] == ["2010", "2011", "2012", "very"]


def test_a_lamp_item_that_repeats_the_query_is_not_trained_on(tmp_path):
    query, item, _, _ = LAMP["LaMP_3"]
    leak = {"id": "8", "text": "Good: very", "score": 5}
    source = load_users(write_lamp(tmp_path, "dev", [{"id": "1", "input": query, "profile": [leak, item]}], {"1": "5"}))
    (user,) = source
    assert responses(user) == ["1", "5"]
    assert source.notes == {"profile items that repeat a held-out query": 1}


def test_the_outputs_are_part_of_a_lamp_sources_digest(tmp_path):
    query, item, _, _ = LAMP["LaMP_3"]
    questions = [{"id": "1", "input": query, "profile": [item]}]
    path = write_lamp(tmp_path, "dev", questions, {"1": "5"})
    before = load_users(path).source_digest
    write_lamp(tmp_path, "dev", questions, {"1": "4"})
    assert load_users(path).source_digest != before


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"id": "2", "input": 1, "profile": []}, "entry 2: 'input' is not text or 'profile' is not a list"),
        ({"id": "2", "input": "x", "profile": [CONTENT]}, "entry 2: item 1 of the profile is not an object"),
        (
            {"id": "2", "input": "x", "profile": [{CONTENT: 1}]},
            "entry 2: the profile's items are those of no",
        ),
        (
            {"id": "2", "input": "x: y", "profile": [{"tag": "x"}]},
            "entry 2: item 1 of the profile: 'description' is not",
        ),
        (
            {"id": "2", "input": CONTENT, "profile": [{"tag": "x", "description": "x"}]},
            "entry 2: item 1 of the profile: the qu",
        ),
        ({"id": "1", "input": "x: y", "profile": [LAMP["LaMP_1"][1]]}, "entry 2: this user was there before"),
        ({"input": "x", "profile": []}, "entry 2: no user is named"),
        ({CONTENT: "x"}, "entry 2: not a LaMP question"),
    ],
)
def test_a_broken_lamp_entry_is_named_by_its_number(tmp_path, entry, expected):
    query, item, _, _ = LAMP["LaMP_2"]
    path = write_lamp(tmp_path, "dev", [{"id": "1", "input": query, "profile": [item]}, entry], {"1": "x"})
    assert f"{path}: {expected}" in message_of(path)


def test_lamps_answers_alone_are_refused_with_a_hint(tmp_path):
    query, item, _, _ = LAMP["LaMP_2"]
    write_lamp(tmp_path, "dev", [{"id": "1", "input": query, "profile": [item]}], {"1": "x"})
    assert "give the file of questions" in message_of(tmp_path / "dev_outputs.json")


# ---- tables


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
def test_a_csv_gathers_the_rows_of_a_user_and_keeps_ids_as_they_are(tmp_path, name):
    rows = [
        ["author", "body", "date"],
        ["007", "one", "2020-01-02"],
        ["NA", '"x"', ""],
        ["007", "two\nlines", "2020-01-01"],
    ]
    sep = "\t" if "tsv" in name else ","
    text = "\n".join(sep.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    bond, other = load_users(path, user_column="author", text_column="body", time_column="date")
    assert (bond.id, responses(bond)) == ("007", ["one", "two\nlines"])
    assert bond.records[0].time == datetime(2020, 1, 2, tzinfo=UTC).timestamp()
    assert (other.id, other.records) == ("NA", (Record("", '"x"'),))


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("user,text", "a,x", Record("", "x")),
        ("user,text,time", "a,x,5", Record("", "x", 5.0)),
        ("user,prompt,response", "a,p,r", Record("p", "r", None, "reply")),
        ("user,prompt,chosen,rejected", "a,p,c,r", Record("p", "c", None, "preference", "r")),
        ("user,prompt,response", "a,p,", Record("p", "", None, "reply")),
    ],
)
def test_columns_with_the_usual_names_need_not_be_named(tmp_path, header, row, expected):
    (tmp_path / "t.csv").write_text(f"{header}\n{row}\n")
    (user,) = load_users(tmp_path / "t.csv")
    assert user == User("a", (expected,))


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("name,body\na,x\n", {}, "no column 'user'; columns there: name, body"),
        ("user,body\na,x\n", {}, "no column 'text'; columns there: user, body"),
        ("user,text\na,x\n", {"text_column": "body"}, "no column 'body'; columns there: user, text"),
        ("user,text\na,x\n", {"time_column": "date"}, "no column 'date'; columns there: user, text"),
        (f"user,text\na,x\nb,{CONTENT},y\n", {}, "line 3: 3 cells, the header has 2"),
        (f'user,text\na,"x\ny"\n,{CONTENT}\n', {}, "line 4: no user is named"),
        (f'user,text\na,"{CONTENT}"x\n', {}, "line 2: not valid CSV"),
        (f"user,text,time\na,x,{CONTENT}\n", {}, "line 2: the time is neither a number nor ISO 8601"),
        ("user,text\n", {}, "is empty, no users there"),
        (f"user,text,text\na,x,{CONTENT}\n", {}, "2 columns are called 'text'; which one is meant cannot be told"),
        (f"user,text,user\na,x,{CONTENT}\n", {}, "2 columns are called 'user'; which one is meant cannot be told"),
    ],
)
def test_a_broken_csv_is_named_by_line_or_column(tmp_path, text, options, expected):
    (tmp_path / "t.csv").write_text(text)
    assert expected in message_of(tmp_path / "t.csv", **options)


def test_lines_of_json_are_a_table_when_a_column_is_named(tmp_path):
    path = write_lines(
        tmp_path / "t.jsonl", {"user": "a", "body": "x"}, {"user": "b", "body": None}, {"user": "a", "body": "y"}
    )
    users = list(load_users(path, text_column="body"))
    assert [(user.id, responses(user)) for user in users] == [("a", ["x", "y"]), ("b", [""])]
    assert "no column 'x'; columns there: user, body" in message_of(path, text_column="x")
    write_lines(path, {"user": "a", "body": "x"}, [CONTENT])
    assert "line 2: not a JSON object" in message_of(path, text_column="body")


def test_parquet_holds_a_record_or_a_user_per_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    when = datetime(2020, 1, 1, tzinfo=UTC)
    records = tmp_path / "records.parquet"
    parquet.write_table(pa.table({"id": [1, 2, 1], "body": ["x", None, "y"], "when": [when, None, when]}), records)
    one, two = load_users(records, user_column="id", text_column="body", time_column="when")
    assert one == User("1", (Record("", "x", when.timestamp()), Record("", "y", when.timestamp())))
    assert two == User("2", (Record("", ""),))
    assert "no column 'user'; columns there: id, body, when" in message_of(records)

    people = tmp_path / "people.parquet"
    rows = [{"user": "a", "examples": [{"prompt": "p", "response": "r"}], "profile": ["tea"], "vector": [1.0]}]
    parquet.write_table(pa.Table.from_pylist(rows), people)
    assert list(load_users(people)) == [User("a", (Record("p", "r", None, "reply"),), ("tea",))]

    people.write_bytes(b"PAR1 not really")
    assert "cannot be read as Parquet" in message_of(people)


# ---- folders and Hugging Face


def test_a_folder_of_data_files_of_one_kind_is_read_as_one(tmp_path):
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "1.jsonl", {"user": "a", "texts": ["x"]})
    write_lines(tmp_path / "data" / "2.jsonl.gz", {"user": "b", "texts": ["x"]})
    (tmp_path / "README.md").write_text("hello")
    assert [user.id for user in load_users(tmp_path)] == ["a", "b"]
    (tmp_path / "data" / "3.csv").write_text("user,text\nc,x\n")
    assert "several kinds there (.csv, .jsonl)" in message_of(tmp_path)


def test_a_folder_of_parquet_files_gathers_users_over_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for part in range(2):
        parquet.write_table(
            pa.table({"user": ["a", f"b{part}"], "text": [f"x{part}", "y"]}), tmp_path / f"{part}.parquet"
        )
    users = {user.id: responses(user) for user in load_users(tmp_path)}
    assert users == {"a": ["x0", "x1"], "b0": ["y"], "b1": ["y"]}


@pytest.fixture
def dataset():
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"user": ["a", "b", "a"], "text": ["x", "y", "z"], "time": [1, 2, 3]})


def test_a_saved_data_set_and_one_in_memory_are_read_alike(tmp_path, dataset):
    dataset.save_to_disk(tmp_path / "set")
    expected = [User("a", (Record("", "x", 1.0), Record("", "z", 3.0))), User("b", (Record("", "y", 2.0),))]
    assert list(load_users(tmp_path / "set")) == expected
    assert list(load_users(dataset)) == expected
    assert load_users(tmp_path / "set").source_digest == load_users(dataset).source_digest


def test_of_several_splits_train_is_taken_or_one_must_be_named(tmp_path, dataset):
    from datasets import DatasetDict

    assert len(list(load_users(DatasetDict({"train": dataset, "test": dataset})))) == 2
    DatasetDict({"dev": dataset, "test": dataset}).save_to_disk(tmp_path / "set")
    assert "name one of the splits" in message_of(tmp_path / "set")
    assert len(list(load_users(tmp_path / "set" / "dev"))) == 2


def test_a_hub_name_without_a_network_says_so(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = message_of("homespun-nobody/no-such-data:config@train")
    assert "no such file or folder here, and not to be had from the Hugging Face hub (offline" in message


def test_a_hub_name_is_loaded_with_its_configuration_and_split(monkeypatch, dataset):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or dataset)
    assert len(list(load_users("owner/name:config@dev"))) == 2
    assert len(list(load_users("owner/name"))) == 2
    assert asked == [(("owner/name", "config"), {"split": "dev"}), (("owner/name", None), {"split": None})]


# ---- memory


def test_a_frame_is_read_by_its_columns():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "author": [1, 2, 1],
            "body": ["x", None, "z"],
            "when": pandas.to_datetime(["2020-01-01", None, "2020-01-02"]),
        }
    )
    one, two = load_users(frame, user_column="author", text_column="body", time_column="when")
    start = datetime(2020, 1, 1, tzinfo=UTC).timestamp()
    assert one == User("1", (Record("", "x", start), Record("", "z", start + 86400)))
    assert two == User("2", (Record("", ""),))
    assert "no column 'user'; columns there: author, body, when" in message_of(frame)


def test_a_frame_with_a_user_per_row_is_read():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"user": ["a"], "texts": [["x", "y"]], "profile": ["tea"]})
    assert list(load_users(frame)) == [User("a", (Record("", "x"), Record("", "y")), ("tea",))]


def test_a_dictionary_of_lists_is_read():
    people = {"a": ["x", {"prompt": "p", "response": "r"}], 2: [Record("p", "c", rejected="r")]}
    assert list(load_users(people)) == [
        User("a", (Record("", "x"), Record("p", "r", None, "reply"))),
        User("2", (Record("p", "c", rejected="r"),)),
    ]
    assert message_of({"a": ["x"], CONTENT: CONTENT}) == "user 2: not a list with records"
    assert message_of({CONTENT: [7]}) == "user 1: record 1: neither a text nor an object"
    assert "is empty" in message_of({})


def test_users_are_taken_as_they_are():
    users = [User("a", (Record("", "x"),)), User("b", (Record("", "y"),))]
    assert list(load_users(users)) == users
    assert message_of([User(CONTENT, ())]) == "user 1: a user without records"
    assert "this user was there before" in message_of([users[0], users[0]])


@given(st.integers(0, 4), st.sampled_from(["prompt", "response", "time", "task", "rejected", "kind"]))
def test_the_digest_of_data_in_memory_depends_on_every_field(index, name):
    def digest(change):
        fields = [
            {"prompt": "p", "response": "r", "time": 1.0, "task": "t", "rejected": "n", "kind": "k"} for _ in range(5)
        ]
        fields[index].update(change)
        return load_users({"a": [Record(**own) for own in fields]}).source_digest

    assert digest({}) == digest({})
    assert digest({name: 2.0 if name == "time" else "other"}) != digest({})


# ---- the rest


def test_a_subject_key_names_a_user_only_for_who_holds_the_salt():
    key = subject_key("../../alice", b"s" * 16)
    assert key == subject_key("../../alice", b"s" * 16)
    assert len(key) == 32
    assert set(key) <= set("0123456789abcdef")
    assert key != subject_key("../../alice", b"t" * 16)
    assert key != subject_key("../../bob", b"s" * 16)
    with pytest.raises(ValueError, match="16 bytes"):
        subject_key("alice", b"short")


def test_lines_are_read_without_pandas_pyarrow_datasets_torch_or_transformers(tmp_path):
    path = write_lines(tmp_path / "users.jsonl", {"user": "a", "texts": ["x"]})
    code = (
        "import sys\nfrom simulations.worlds.loaders import load_users\nlist(load_users(sys.argv[1]))\n"
        "heavy = {'pandas', 'pyarrow', 'datasets', 'torch', 'transformers', 'flwr'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False).returncode == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
@pytest.mark.parametrize(
    ("name", "users", "records"),
    [
        ("shakespeare_roles", 471, 25_781),
        ("synthetic_personachat", 178, 44_021),
        ("ubuntu_irc", 1_147, 88_290),
        ("prefeval_pairs", 1_052, 3_156),
    ],
)
def test_the_real_files_are_read_whole(name, users, records):
    found = [(user.id, len(user.records)) for user in load_users(DATA / f"{name}.jsonl")]
    assert (len(found), sum(count for _, count in found)) == (users, records)
