"""The page of a run: complete, self-contained, silent about people, and honest about what is missing."""

import io
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from common.errors import ConfigError, DataError
from common.evaluation import Summary
from simulations.report import terminal_table, write_report

FAKE = runpy.run_path(str(Path(__file__).with_name("fake_run.py")))
write_fake_run, STATEMENT = FAKE["write_fake_run"], FAKE["STATEMENT"]

VOID = {"meta", "link", "br", "img", "input", "hr"}
SELF_CLOSING_SVG = {"line", "rect", "circle", "polyline", "path"}


class Reader(HTMLParser):
    """Collects text, tags and addresses, and fails where a tag is not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.tags, self.addresses = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in {"src", "href", "xlink:href", "action", "srcset"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # noqa: ARG002
        assert tag in SELF_CLOSING_SVG
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def read(page):
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def text_of(page):
    return " ".join(" ".join(read(page).words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_fake_run(tmp_path_factory.mktemp("runs") / "demo")
    write_report(folder)
    return folder


def test_the_page_holds_the_table_the_promise_and_every_figure(run):
    text = text_of(run / "report.html")
    for words in (
        "Personalization helped 97% of users and harmed 2%",
        "4,000 users of the built-in world trained one shared LoRA adapter",
        "299 users were scored on held-out records of their own; 1 could not be",
        "Epsilon 8.00 at delta 1e-5, per user",
        "against the coordinator epsilon is infinite",
        "Learning curve of the shared adapter",
        "Gain per user",
        "Gain against number of records",
        "Privacy budget over rounds",
        "both over private",
        "Accuracy",
        "16.4 kB",
        "A user is expected to be chosen in 1.00 of 20 rounds",
        "homespun sim run config.toml",
        "homespun audit verify ledger.jsonl",
        "29 entries",
        "0.20 of the clip",
        "10th percentile 12, median 24, 90th percentile 41, 99th percentile 58; cut at 64",
        "Updates rejected 1, not finite or misshapen",
    ):
        assert words in text, words
    for item in (*STATEMENT["covered"], *STATEMENT["not_covered"], *STATEMENT["assumptions"]):
        assert item in text


def test_the_numbers_of_the_table_are_those_of_the_scores(run):
    table = pq.read_table(run / "users.parquet").to_pandas()
    scored = table[(table["split"] == "test") & (table["tokens"] > 0)]
    both = np.sort(scored[scored["system"] == "both"]["nats_per_token"].to_numpy())
    worst = both[-30:].mean()
    rows = re.findall(r"<tr.*?</tr>", (run / "report.html").read_text(encoding="utf-8"), re.S)
    (row,) = [row for row in rows if "shared and private adapter together" in row]
    numbers = re.findall(r"<b>([\d.]+)</b>", row)
    assert numbers == [f"{both.mean():.3f}", f"{np.median(both):.3f}", f"{worst:.3f}"]


def test_the_summary_beside_the_page_is_the_page_s_own(run):
    summary = Summary.from_json(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    assert [metric.metric.name for metric in summary.metrics] == ["nats_per_token", "accuracy", "exact"]
    assert (summary.metrics[0].users, summary.metrics[0].excluded) == (299, 1)
    mean = summary.metrics[0].system("both").mean
    assert f"{mean.low:.3f} to {mean.high:.3f}" in text_of(run / "report.html")


def test_the_page_loads_nothing_and_runs_nothing(run):
    reader = read(run / "report.html")
    assert not {"script", "img", "iframe", "object", "embed", "form"} & set(reader.tags)
    assert set(reader.addresses) == {"ledger.jsonl", "data:,"}
    source = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|\son\w+=|javascript:", source)
    assert re.findall(r"url\((.*?)\)", source) == ["#hatch"]
    assert "default-src &#39;none&#39;" in source or "default-src 'none'" in source


def test_the_page_names_no_user(run):
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "user-0" not in source
    assert "user-0" not in (run / "summary.json").read_text(encoding="utf-8")


def test_the_same_folder_gives_the_same_page(tmp_path):
    folder = write_fake_run(tmp_path / "run", users=20)
    first = write_report(folder).read_bytes(), (folder / "summary.json").read_bytes()
    assert first == (write_report(folder).read_bytes(), (folder / "summary.json").read_bytes())


def test_folders_of_whoever_ran_it_are_not_on_the_page(tmp_path):
    paths = {"model": "/home/somebody/models/tiny", "data": "/home/somebody/notes.jsonl"}
    folder = write_fake_run(tmp_path / "run", users=20, **paths)
    source = write_report(folder).read_text(encoding="utf-8")
    assert "somebody" not in source
    assert "notes.jsonl" in source


def test_hostile_names_and_statements_stay_text(tmp_path):
    hostile = "<script>alert(1)</script>"
    statement = STATEMENT | {"mechanism": hostile, "covered": [hostile], "trust": hostile}
    folder = write_fake_run(tmp_path / "a<b>&'run'", users=20, statement=statement, data=hostile, targets=(hostile,))
    page = write_report(folder)
    assert "script" not in read(page).tags
    assert text_of(page).count(hostile) >= 4


def test_a_run_that_shared_nothing_says_so(tmp_path):
    statement = STATEMENT | {"epsilon": 0.0}
    folder = write_fake_run(
        tmp_path / "run", users=30, method="local", systems=("base", "private"), statement=statement
    )
    text = text_of(write_report(folder))
    assert "each trained a private LoRA adapter of rank 2 on the built-in base model; nothing was shared" in text
    assert "NOTHING SHARED Nothing left the devices" in text
    assert "What moved" not in text
    assert "Epsilon 0" not in text


def test_a_run_without_noise_makes_no_privacy_claim(tmp_path):
    statement = STATEMENT | {"epsilon": "inf"}
    settings = {"epsilon": "inf", "method": "fedavg", "systems": ("base", "global")}
    text = text_of(write_report(write_fake_run(tmp_path / "run", users=30, statement=statement, **settings)))
    assert "NO PRIVACY CLAIM" in text
    assert "Privacy budget over rounds" not in text
    assert "The shared adapter helped" in text
    assert "private one" not in text


def test_a_rehearsal_is_not_claimed_anywhere(tmp_path):
    folder = write_fake_run(tmp_path / "run", users=30, rehearsal=True, statement=STATEMENT | {"rehearsal": True})
    text = text_of(write_report(folder))
    assert "NOT CLAIMED Calibrated to epsilon 8.00; rehearsal, not claimed" in text
    assert "The same versions give the same numbers" in text
    assert "Epsilon 8.00 at delta" not in text


def test_an_unfinished_run_gets_a_page_and_no_summary(tmp_path):
    folder = write_fake_run(tmp_path / "run", systems=(), statement=None)
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()[:7]
    (folder / "rounds.jsonl").write_text("\n".join([*lines, '{"round": 8, "eps']), encoding="utf-8")
    text = text_of(write_report(folder))
    assert "unfinished, 7 of 20 rounds" in text
    assert "No user has been scored yet" in text
    assert "UNFINISHED" in text
    assert not (folder / "summary.json").exists()


def test_a_folder_with_only_a_configuration_gets_a_page(tmp_path):
    (tmp_path / "config.toml").write_text("", encoding="utf-8")
    assert "No user has been scored yet" in text_of(write_report(tmp_path))


def test_a_worse_model_is_called_worse(tmp_path):
    folder = write_fake_run(tmp_path / "run", users=40, systems=("base", "global"))
    table = pq.read_table(folder / "users.parquet").to_pandas()
    table.loc[table["system"] == "global", "nats_per_token"] += 1.0
    table.to_parquet(folder / "users.parquet")
    text = text_of(write_report(folder))
    assert "The shared adapter made the model worse: 100% of users harmed, 0% helped" in text
    assert "worse than base" in text


def test_users_without_held_out_records_are_said_to_be_so(tmp_path):
    folder = write_fake_run(tmp_path / "run", users=1)
    assert "no held-out records that could be scored" in text_of(write_report(folder))
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rounds.jsonl", '{"round": 1}\nnot json\n{"round": 3}\n', "line 2 is not valid JSON"),
        ("statement.json", "{", "statement.json: not valid JSON"),
        ("users.parquet", "no table", "users.parquet: not a Parquet file"),
    ],
)
def test_a_broken_file_is_named_and_nothing_is_written(tmp_path, name, content, message):
    folder = write_fake_run(tmp_path / "run", users=20)
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_table_without_scores_is_refused_by_column(tmp_path):
    folder = write_fake_run(tmp_path / "run", users=20)
    table = pq.read_table(folder / "users.parquet").drop_columns(["nats_per_token"])
    pq.write_table(table, folder / "users.parquet")
    with pytest.raises(DataError, match="has no column nats_per_token"):
        write_report(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        write_report(tmp_path)


def printed(summary, statement):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(summary, statement))
    return console.export_text()


def test_the_terminal_shows_the_same_table(run):
    summary = Summary.from_json(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    text = printed(summary, STATEMENT)
    both = summary.metrics[0].system("both")
    for words in (
        f"{both.mean.estimate:.3f}",
        f"{both.worst_decile.estimate:.3f}",
        "97%/2%",
        "better",
        "system",
        "private",
    ):
        assert words in text
    assert "Epsilon 8.00 at delta 1e-5, per user (claimed)" in text


def test_the_terminal_says_when_nobody_was_scored():
    text = printed(Summary("test", 0.95, 0, ()), None)
    assert "no user was scored" in text
    assert "No statement was written (unfinished)" in " ".join(text.split())


def test_what_all_runs_on_the_data_cost_stands_beside_the_promise_and_is_escaped(tmp_path):
    write_fake_run(tmp_path / "run", users=20)
    sentence = "all 14 runs on this data, epsilon 41.21 at delta 1e-05 per user"
    (tmp_path / "run" / "spent_on_data.json").write_text(
        json.dumps({"sentence": f"{sentence} <script>alert(1)</script>"})
    )
    page = write_report(tmp_path / "run").read_text()
    assert sentence in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
