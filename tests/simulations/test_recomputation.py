"""What ledgers cost, recomputed; and the frauds that a ledger, well signed by the liar, gives away itself."""

from __future__ import annotations

import pytest

from common.accountants import epsilon_of
from common.events import Gaussian, PoissonGaussian, Repeated, event_from_json
from common.keys import SigningKey
from common.ledger import Ledger
from common.ledger_format import verify
from simulations.recomputation import people, price_ledger, readings, totals, worst

DELTA = 1e-5


def priced(path, name="ledger"):
    return price_ledger(verify(path.read_bytes()), name)


def with_noise(factor):
    """Multiply the noise of every event that is written."""

    def change(kind, body):
        if "event" in body:
            event = event_from_json(body["event"])
            body["event"] = _rescaled(event, factor).to_json()
        return body

    return change


def _rescaled(event, factor):
    if isinstance(event, Repeated):
        return Repeated(_rescaled(event.event, factor), event.count)
    return PoissonGaussian(event.sampling_rate, factor * event.noise_multiplier)


def test_an_honest_ledger_holds_and_its_price_is_that_of_its_events(run):
    price = priced(run / "ledger.jsonl")
    assert (price.verdict, price.faults) == ("holds", ())
    assert price.debits == 3
    step = event_from_json(verify((run / "ledger.jsonl").read_bytes()).entries[2].body["event"])
    report = price.to_json()
    by_name = {name.split()[0]: value for name, value in report["spent"]["epsilon"].items()}
    assert by_name["pld"] == pytest.approx(epsilon_of(Repeated(step, 3), DELTA))
    assert by_name["pld"] - 0.03 <= by_name["prv"] <= by_name["pld"] + 0.03
    assert by_name["rdp"] >= by_name["pld"]
    assert report["spent"]["accountants_agree"]
    assert by_name["pld"] <= report["reserved_epsilon"] <= 8.0


def test_a_gaussian_release_reads_as_what_it_is():
    found = readings([Gaussian(1.0)], DELTA)
    assert found["equivalent_mu"] == pytest.approx(1.0, rel=1e-6)
    # Largest power of a test between N(0, 1) and N(1, 1) at level 1 %: Phi(Phi^-1(0.01) + 1).
    assert found["true_positive_rate_at_1_percent"] == pytest.approx(0.0924, abs=5e-4)
    assert found["people"].endswith("at most 93")
    deltas, epsilons = zip(*found["curve"], strict=True)
    assert epsilons == tuple(sorted(epsilons))
    assert deltas == tuple(sorted(deltas, reverse=True))
    assert readings([], DELTA)["people"].endswith("at most 10")
    assert readings([Gaussian(0.0)], DELTA)["people"].endswith("at most 1,000")
    assert "records" in people(0.5, "example")


# Frauds that the ledger itself shows, whoever signed it


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_a_promise_with_half_the_noise_or_none_is_contradicted(run, forge, factor):
    price = priced(forge(run, with_noise(factor)))
    assert price.verdict == "contradicted"
    assert "promises epsilon 8 and reserves what costs" in price.faults[0]


def test_debits_with_less_noise_than_was_reserved_are_contradicted(run, forge):
    price = priced(forge(run, lambda kind, body: with_noise(0.9)(kind, body) if kind == "debit" else body))
    assert price.verdict == "contradicted"
    assert any("were not reserved" in fault for fault in price.faults)


def test_more_releases_than_were_reserved_are_contradicted(run, forge):
    def change(kind, body):
        return [(kind, body)] * 3 if kind == "debit" else None if kind == "release" else body

    price = priced(forge(run, change))
    assert price.verdict == "contradicted"
    assert any("9 releases" in fault and "5 that it reserves" in fault for fault in price.faults)


def test_debits_beside_the_reservation_are_added_to_those_under_it(run, forge):
    def change(kind, body):
        if kind != "debit":
            return body if kind == "reserve" else None
        return [(kind, body), *[(kind, {k: v for k, v in body.items() if k != "reservation"})] * 4]

    price = priced(forge(run, change))
    assert price.verdict == "contradicted"
    assert any("outside every reservation" in fault for fault in price.faults)


def test_a_delta_that_says_nothing_is_contradicted(run, forge):
    price = priced(forge(run, lambda kind, body: body | {"delta": 1e-3} if kind == "reserve" else body))
    assert price.verdict == "contradicted"
    assert any("says anything" in fault for fault in price.faults)


def test_a_ledger_without_a_promise_claims_nothing(run, forge):
    price = priced(forge(run, lambda kind, body: body | {"epsilon": "inf"} if kind == "reserve" else body))
    assert price.verdict == "no claim"
    loose = priced(
        forge(
            run,
            lambda kind, body: {k: v for k, v in body.items() if k != "reservation"} if kind == "debit" else None,
        )
    )
    assert loose.verdict == "not shown"


def test_what_refills_granted_is_the_limit_of_a_device(tmp_path):
    for granted, verdict in ((20.0, "holds"), (4.0, "contradicted")):
        path = tmp_path / str(granted) / "ledger.jsonl"
        subject = "ab" * 16
        header = {"role": "device", "subject": subject, "policy": "00" * 32, "source": "00" * 32}
        with Ledger.create(path, SigningKey.generate(), header) as ledger:
            ledger.append("refill", {"epsilon": granted, "delta": DELTA, "subject": subject})
            for _ in range(4):
                ledger.append("debit", {"event": Gaussian(2.0).to_json(), "subject": subject})
        assert priced(path).verdict == verdict


def test_a_compacted_ledger_costs_what_the_whole_one_does(tmp_path, run):
    key = SigningKey.generate()
    entries = verify((run / "ledger.jsonl").read_bytes()).entries
    path = tmp_path / "ledger.jsonl"
    header = {name: value for name, value in entries[0].body.items() if name != "salt"}
    with Ledger.create(path, key, header) as ledger:
        for entry in entries[1:]:
            ledger.append(entry.kind, entry.body)
        before = priced(path)
        ledger.compact()
    after = priced(path)
    assert (after.debits, after.verdict) == (before.debits, before.verdict) == (3, "holds")
    assert epsilon_of(after.spent, DELTA) == pytest.approx(epsilon_of(before.spent, DELTA))


# Several ledgers


def test_a_budget_that_is_reset_between_runs_is_contradicted_for_the_data_set(run, forge):
    prices = [priced(run / "ledger.jsonl", "first"), priced(forge(run), "second")]
    assert [price.verdict for price in prices] == ["holds", "holds"]
    total = totals(prices, budget=8.0)
    assert total["organization"]["verdict"] == "contradicted"
    (same_data,) = total["data_sets"]
    assert (same_data["verdict"], same_data["ledgers"]) == ("contradicted", ["first", "second"])
    together = epsilon_of([*prices[0].spent, *prices[1].spent], DELTA)
    assert next(iter(same_data["spent"]["epsilon"].values())) == pytest.approx(together)
    assert together > 8.0
    assert totals(prices, budget=40.0)["organization"]["verdict"] == "holds"
    assert totals(prices)["organization"]["verdict"] == "not shown"


def test_one_ledger_that_is_handed_in_twice_is_one(run):
    once = totals([priced(run / "ledger.jsonl")])["organization"]["spent"]["epsilon"]
    twice = totals([priced(run / "ledger.jsonl", "a"), priced(run / "ledger.jsonl", "b")])
    assert twice["organization"]["spent"]["epsilon"] == once


def test_other_data_are_another_sum_and_still_count_for_the_organization(run, forge):
    prices = [priced(run / "ledger.jsonl", "first"), priced(forge(run, header={"data": "ab" * 32}), "second")]
    total = totals(prices, budget=8.0)
    assert [part["verdict"] for part in total["data_sets"]] == ["holds", "holds"]
    assert total["organization"]["verdict"] == "contradicted"


def test_rehearsals_are_left_out_and_unlike_units_have_no_sum(run, forge):
    rehearsal = priced(forge(run, header={"rehearsal": True}), "rehearsal")
    total = totals([priced(run / "ledger.jsonl", "real"), rehearsal], budget=8.0)
    assert (total["left_out"], total["organization"]["verdict"]) == (["rehearsal"], "holds")
    other = priced(forge(run, lambda kind, body: body | {"unit": "example"} if kind == "reserve" else body), "records")
    mixed = totals([priced(run / "ledger.jsonl", "users"), other])["organization"]
    assert mixed["verdict"] == "not shown"
    assert "no sum" in mixed["why"]


def test_accountants_that_differ_by_more_than_they_can_are_reported(monkeypatch):
    import simulations.recomputation as module

    real = module.epsilon_of
    monkeypatch.setattr(
        module,
        "epsilon_of",
        lambda events, delta, name="pld", adjacency="zero-out": (
            real(events, delta, name, adjacency) * (0.8 if name == "prv" else 1.0)
        ),
    )
    found = readings([PoissonGaussian(0.1, 1.0)] * 5, DELTA)
    assert not found["accountants_agree"]
    assert "broken" in found["difference"]


def test_the_gravest_verdict_counts():
    assert worst(["holds", "contradicted", "not shown"]) == "contradicted"
    assert worst(["holds", "no claim"]) == "holds"
    assert worst([]) == "no claim"
