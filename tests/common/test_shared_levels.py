"""Input levels in the shared forward pass: refused where one record could move another's gradient, with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from client.vault import EncodedUser, Vault
from common.config import RunConfig
from common.errors import ClaimRefused, ConfigError, Refusal
from common.shared_levels import CARRIED, check_shared_levels
from common.wire import Assignment
from simulations import hosts
from simulations.run import Progress, start


@pytest.mark.parametrize("level", sorted(CARRIED))
def test_every_input_level_is_refused_in_silo_mode_with_its_reason(level):
    with pytest.raises(ClaimRefused, match=f"{level}: .*no clip bounds that"):
        check_shared_levels((level,), "example", claimed=True)


def test_text_is_allowed_where_the_whole_update_is_clipped_and_where_nothing_is_claimed():
    check_shared_levels(("profile", "retrieval"), "user", claimed=True)
    check_shared_levels(("retrieval",), "example", claimed=False)
    check_shared_levels((), "example", claimed=True)


@pytest.mark.parametrize("levels", [("soft-prompt",), ("steering",), ("telepathy",)])
def test_what_shared_steps_cannot_be_trained_with_is_a_mistake(levels):
    with pytest.raises(ConfigError):
        check_shared_levels(levels, "user", claimed=True)


@pytest.mark.parametrize("level", sorted(CARRIED))
def test_a_silo_run_with_an_input_level_in_the_shared_pass_does_not_start(level, tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    config = RunConfig(users=20, cohort=20, unit="example", shared_levels=(level,), workers=0)
    with pytest.raises(ClaimRefused, match="no clip bounds that"):
        start(config, tmp_path / "run", Progress())
    assert not (tmp_path / "run").exists()


def spec_of(release_spec, layout, digest, **changes):
    return release_spec(
        names=tuple(tensor.name for tensor in layout.tensors),
        shapes=tuple(tensor.shape for tensor in layout.tensors),
        model=digest,
        **changes,
    )


@pytest.mark.parametrize("level", sorted(CARRIED))
def test_a_device_refuses_a_server_that_asks_for_it(level, release_spec):
    """The server's own check is not what a device relies on."""
    config = RunConfig(users=20, cohort=5, workers=0, rehearsal=True)
    host = hosts.open_host(config.to_toml())
    recipe = {**release_spec().recipe, "shared_levels": level, "rank": 2}
    opened = []

    def user(name):
        opened.append(name)
        return EncodedUser((), (), (), by_record=True)

    vault = Vault(host.trainer, user, seed=0, residents=["0"])
    spec = spec_of(release_spec, host.trainer.layout, host.base.digest, unit="example", noise="local", recipe=recipe)
    vector = np.zeros(host.trainer.layout.size, np.float32)
    with pytest.raises(ClaimRefused, match=level):
        vault.train(Assignment(spec, 1, ("0",), vector))
    user_spec = spec_of(release_spec, host.trainer.layout, host.base.digest, recipe=recipe)
    with pytest.raises(Refusal):
        vault.train(Assignment(user_spec, 1, ("0",), vector))
    assert opened in ([], ["0"])


def test_in_crowd_mode_the_shared_steps_are_trained_with_what_is_retrieved():
    config = RunConfig(users=20, cohort=5, workers=0, rehearsal=True, shared_levels="retrieval,profile")
    host = hosts.open_host(config.to_toml())
    plain = host.population.encoded("3").train
    shown = host.vault._in_context("3", ("retrieval", "profile"))
    assert len(plain) == len(shown)
    assert all(len(one.ids) >= len(other.ids) for one, other in zip(shown, plain, strict=True))
    assert sum(len(one.ids) for one in shown) > sum(len(one.ids) for one in plain)
    for one, other in zip(shown, plain, strict=True):
        assert (one.ids[one.first_label :] == other.ids[other.first_label :]).all()
