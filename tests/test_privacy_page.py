"""docs/privacy.md names tests, files and functions; all of them are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", PAGE))
    found = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 60
    assert named - found == set()


def test_every_file_and_function_that_the_page_names_exists():
    for path, name in re.findall(r"`((?:common|client|server|simulations)/[a-z_/]+\.py)`(?: `([a-z_]+)`)?", PAGE):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, f"{path} {name}"


def test_every_part_that_the_page_links_to_exists():
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^##+ (.+)$", PAGE, re.M)
    }
    assert set(re.findall(r"\]\(#([a-z0-9-]+)\)", PAGE)) <= headings


def test_the_table_of_the_three_columns_is_the_one_that_code_prices_by():
    from dataclasses import replace

    from common.privacy import Adjacency
    from common.promise import promise_of
    from common.wire import ReleaseSpec

    spec = ReleaseSpec(
        run="ab" * 8,
        method="dual",
        names=("a",),
        shapes=((2,),),
        dtype="float32",
        unit="user",
        noise="central",
        clip=1.0,
        noise_multiplier=1.0,
        sampling_rate=0.1,
        rounds=2,
        epsilon="8.0",
        delta=1e-5,
        population=100,
        recipe={"local_steps": 3, "local_batch": 2, "example_records": 100},
        model="1" * 64,
        source="2" * 64,
    )
    for change, adjacency, sensitivity, rate, steps in (
        ({}, Adjacency.ZERO_OUT, 1.0, 0.1, 1),
        ({"noise": "local"}, Adjacency.REPLACE_ONE, 2.0, 1.0, 1),
        ({"unit": "example"}, Adjacency.ADD_REMOVE, 1.0, 0.02, 3),
    ):
        promise = promise_of(replace(spec, **change))
        assert (promise.adjacency, promise.rate, promise.steps) == (adjacency, rate, steps)
        assert promise.noise_scale(1.0, 1.0) == sensitivity
        assert f"| {adjacency}" in PAGE or f"{adjacency}:" in PAGE
