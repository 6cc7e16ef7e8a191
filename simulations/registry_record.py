"""An audited run as a record of the Differential Privacy Deployments Registry.

The form is that of the records in opendp/deployments-registry-data (2026), as JSON, which is YAML too. What an audit
can know is filled in; what only the curator knows (who, where, what for) is asked for, and marked where it is not told.
The proposed schema: Nanayakkara, Ghazi and Vadhan (2025), arXiv:2509.13509.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from common.claims import ADJACENCY_WORDS, ASSUMPTIONS, NOT_COVERED
from common.privacy import Adjacency
from common.promise import promise_of
from simulations.audit import Audit
from simulations.shown_evidence import Shown

__all__ = ["registry_record"]

ASKED = "To be told by the curator."
UNITS = {"user": "User-level", "example": "Record-level"}


def registry_record(done: Audit, told: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Write the record of what `done` audited; None where nothing is claimed.

    Args:
        done: The audit.
        told: What only the curator knows: `name`, `curator`, `intended_use`, `region`, `sector`, `author`.
    """
    told = told or {}
    whole = done.summed["organization"]
    runs = [one for one in done.shown if one.price is not None and one.spec is not None and not one.price.is_rehearsal]
    if not runs or "spent" not in whole:
        return None
    epsilon = next(iter(whole["spent"]["epsilon"].values()))
    if isinstance(epsilon, str):
        return None
    first = runs[0]
    name = told.get("name", "Personalized language model adapter")
    return {
        "url_slug": re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"),
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "product": {
                "name": name,
                "data_curators": [told.get("curator", ASKED)],
                "intended_use": told.get("intended_use", ASKED),
                "data_product_type": "Machine learning model",
                "data_product_region": told.get("region", ASKED),
                "description": "A LoRA adapter on a frozen language model, trained with federated learning; each user "
                "also keeps a private adapter, which never leaves the device.",
                "publication_date": _date(first),
                "data_product_sector": told.get("sector", "Technology"),
            },
            "dp_flavor": {
                "name": "Approximate DP",
                "data_domain": "Records that users keep on their own devices.",
                "unprotected_quantities": "; ".join(NOT_COVERED),
            },
            "privacy_loss": _loss(first, whole, float(epsilon)),
            "model": _model(first, len(runs)),
            "accounting": {
                "post_processing": "The noised mean moves the shared adapter by gradient descent with momentum.",
                "composition": f"{len(runs)} run(s), every round of each, composed by privacy loss distributions over "
                f"the events of signed ledgers; {whole['spent']['difference']}.",
            },
            "implementation": _implementation(first, done),
            "resources": {
                "sources": "audit.json beside this record: the ledgers' heads, keys and digests",
                "registry_authors": [told.get("author", ASKED)],
            },
        },
    }


def _date(shown: Shown) -> str:
    return shown.verified.entries[-1].time[:10] if shown.verified is not None else ""


def _loss(shown: Shown, whole: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    price = shown.price
    unit = str(price.unit) if price is not None else "user"
    adjacency = price.adjacency if price is not None else Adjacency.ZERO_OUT
    spent = whole["spent"]
    return {
        "privacy_unit": UNITS.get(unit, unit),
        "privacy_unit_description": f"Neighbouring data sets differ in one {unit} {ADJACENCY_WORDS[adjacency]}.",
        "privacy_parameters": {"epsilon": math.ceil(epsilon * 100) / 100, "delta": whole["delta"]},
        "privacy_parameters_description": f"Over everything that was audited. {spent['people']}.",
    }


def _model(shown: Shown, runs: int) -> dict[str, Any]:
    spec = shown.spec
    local = spec is not None and promise_of(spec).noise == "local"
    trust = "not shown"
    if spec is not None:
        trust = promise_of(spec).statement(spec, 1).trust
    if spec is not None and spec.noise == "central" and spec.unit == "user":
        trust += "; it must be trusted to add the noise"
    return {
        "model_name": "Local" if local else "Central",
        "actors": f"- Devices hold their owners' records and compute clipped updates.\n- Coordinator: {trust}.\n"
        "- Whoever gets the shared adapter sees it after every round and need not be trusted.",
        "release_type": "Many releases",
        "release_type_description": f"The shared adapter after every round of {runs} run(s).",
        "data_source_type": "Dynamic",
        "access_type": "Non-interactive",
    }


def _implementation(shown: Shown, done: Audit) -> dict[str, str]:
    spec = shown.spec
    if spec is None or shown.price is None:
        return {
            "pre_processing_eda_hyperparameter_tuning": ASKED,
            "mechanisms": "not shown",
            "justification": ASKED,
        }
    statement = promise_of(spec).statement(spec, max(shown.price.debits, 1))
    return {
        "pre_processing_eda_hyperparameter_tuning": "Choosing among runs is not priced unless each run is in the "
        "audited ledgers. " + ASKED,
        "mechanisms": f"- {statement.mechanism}.\n- {statement.sampling}.\n- Assumed: {'; '.join(ASSUMPTIONS)}.\n"
        f"- Code digest {spec.source}.",
        "justification": f"Audit verdict: {done.verdict}. {statement.trust}.",
    }
