"""The record for the deployments registry: its form, and that no number in it is smaller than what was spent."""

from __future__ import annotations

import pytest

from simulations.audit import audit
from simulations.registry_record import ASKED, registry_record

TIME = "2026-01-31T12:00:00Z"

# Groups and fields of a record of tier 3 in opendp/deployments-registry-data (deployments/*.yaml, 2026).
FORM = {
    "product": {
        "name",
        "data_curators",
        "intended_use",
        "data_product_type",
        "data_product_region",
        "description",
        "publication_date",
        "data_product_sector",
    },
    "dp_flavor": {"name", "data_domain", "unprotected_quantities"},
    "privacy_loss": {
        "privacy_unit",
        "privacy_unit_description",
        "privacy_parameters",
        "privacy_parameters_description",
    },
    "model": {"model_name", "actors", "release_type", "release_type_description", "data_source_type", "access_type"},
    "accounting": {"post_processing", "composition"},
    "implementation": {"pre_processing_eda_hyperparameter_tuning", "mechanisms", "justification"},
    "resources": {"sources", "registry_authors"},
}


def test_the_record_has_the_form_of_the_registrys_own(run):
    record = registry_record(audit([run], time=TIME), {"name": "Spring model", "curator": "Example"})
    assert record.keys() == {"url_slug", "status", "tier", "deployment"}
    assert (record["url_slug"], record["status"]) == ("spring-model", "Draft")
    assert {group: set(fields) for group, fields in record["deployment"].items()} == FORM
    assert record["deployment"]["product"]["data_curators"] == ["Example"]


def test_epsilon_is_that_of_everything_and_never_rounded_down(run, forge):
    done = audit([run], time=TIME)
    spent = next(iter(done.summed["organization"]["spent"]["epsilon"].values()))
    stated = registry_record(done)["deployment"]["privacy_loss"]["privacy_parameters"]
    assert spent <= stated["epsilon"] < spent + 0.011
    assert stated["delta"] == pytest.approx(1e-5)


@pytest.mark.parametrize(("noise", "model"), [("local", "Local"), ("central", "Central")])
def test_who_has_to_be_trusted_is_in_it(fleet_zips, noise, model):
    record = registry_record(audit([fleet_zips(noise)[0]], time=TIME))
    assert record["deployment"]["model"]["model_name"] == model
    assert ("must be trusted" in record["deployment"]["model"]["actors"]) == (noise == "central")


def test_what_nobody_told_is_asked_for_and_not_invented(run):
    record = registry_record(audit([run], time=TIME))
    assert record["deployment"]["product"]["data_curators"] == [ASKED]
    assert record["deployment"]["resources"]["registry_authors"] == [ASKED]


def test_what_claims_nothing_is_not_registered(run, forge):
    assert registry_record(audit([forge(run, header={"rehearsal": True})], time=TIME)) is None
