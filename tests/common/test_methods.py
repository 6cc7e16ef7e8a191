"""Methods as data: what each row shares, and what happens to a name that is no row."""

from __future__ import annotations

import pytest

from common.adapters import lora_layout
from common.config import METHOD_ALIASES
from common.errors import ConfigError
from common.methods import METHODS, PLANNED, method_named
from common.model_files import LinearModule

LAYOUT = lora_layout((LinearModule("model.layers.0.q_proj", 6, 4),), 2)


@pytest.mark.parametrize(("name", "factors"), [("local", ""), ("fedavg", "AB"), ("dual", "AB")])
def test_a_row_shares_exactly_its_factors(name, factors):
    method = METHODS[name]
    shared = method.shared_layout(LAYOUT)
    assert {tensor.name.split(".lora_")[1][0] for tensor in shared.tensors} == set(factors)
    assert method.shared_mask(LAYOUT).sum() == shared.size


def test_every_row_says_what_leaves_what_stays_and_where_it_comes_from():
    for name, method in METHODS.items():
        assert method.name == name
        assert all((method.leaves, method.stays, method.noise, method.source))


def test_a_method_that_is_planned_says_so_and_an_unknown_one_is_unknown():
    with pytest.raises(ConfigError, match="not built yet"):
        method_named("flexlora")
    with pytest.raises(ConfigError, match="unknown"):
        method_named("magic")


def test_every_alias_leads_to_a_method_that_is_built_or_planned():
    assert set(METHOD_ALIASES.values()) <= METHODS.keys() | set(PLANNED)
