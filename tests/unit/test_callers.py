"""Which account a caller means, and which may be meant."""

from __future__ import annotations

from uuid import UUID

import pytest

from sluicegate.producers.http.callers import Caller, Role
from sluicegate.producers.submission import account_parameters
from sluicegate.shared.accounts import check_name, name_or_id
from sluicegate.shared.errors import InvalidJob, NotFound

OWN = UUID("0190a6b2-7c1f-7d3e-8a4b-1234567890ab")
OTHER = UUID("0190a6b2-7c1f-7d3e-8a4b-1234567890ac")


def caller(role: Role) -> Caller:
    return Caller(subject="key:1", role=role, account_id=OWN, account="acme")


@pytest.mark.parametrize("role", [Role.USER, Role.OWNER])
def test_others_than_admins_mean_their_own(role: Role) -> None:
    for named in (None, "acme", str(OWN), str(OWN).upper()):
        assert caller(role).account_meant(named) == str(OWN)
    for named in ("", "other", str(OTHER)):
        with pytest.raises(NotFound, match="there is no account"):
            caller(role).account_meant(named)


def test_admins_mean_whom_they_name_or_all() -> None:
    for named in (None, "acme", "other", str(OTHER)):
        assert caller(Role.ADMIN).account_meant(named) == named


@pytest.mark.parametrize("name", [str(OWN), OWN.hex, str(OWN).upper()])
def test_no_account_is_called_like_an_id(name: str) -> None:
    assert name_or_id(name) == OWN
    with pytest.raises(InvalidJob, match=r"account: must not look like an id"):
        check_name(name)


def test_jobs_look_up_ids_as_ids_alone() -> None:
    found = account_parameters(["acme", str(OWN)])
    assert found == {"names": ["acme"], "ids": [OWN]}
