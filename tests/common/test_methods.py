"""Methods as data: what each row says of itself, what it refuses, and what happens to a name that is no row."""

from __future__ import annotations

import pytest

from common.config import METHOD_ALIASES, RunConfig
from common.errors import ConfigError
from common.methods import METHODS, method_named


def test_every_row_says_what_leaves_what_stays_how_noise_enters_and_where_it_comes_from():
    for name, method in METHODS.items():
        assert method.name == name
        assert all((method.leaves, method.stays, method.noise, method.source))
        assert method.shared == (method.leaves != "nothing")
        assert method.private == ("nothing" not in method.stays)


def test_noise_is_called_quadratic_exactly_where_both_factors_of_a_product_are_noised():
    quadratic = {name for name, row in METHODS.items() if row.noise.startswith("quadratic")}
    assert quadratic == {name for name, row in METHODS.items() if row.sends in ("A and B", "lower layers")}


def test_a_name_that_is_no_row_is_unknown_and_says_what_there_is():
    with pytest.raises(ConfigError, match="unknown; choose from local, fedavg"):
        method_named("magic")


def test_the_papers_names_lead_to_rows_and_stand_in_them():
    for alias, name in METHOD_ALIASES.items():
        assert RunConfig(method=alias.upper()).method == name
        assert alias in METHODS[name].aliases or alias == "feddpa"
    for name, row in METHODS.items():
        assert all(METHOD_ALIASES[alias] == name for alias in row.aliases if " " not in alias)
