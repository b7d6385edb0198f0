"""An id is an id: an account that is called like another one's gets nothing that is the other's."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from sluicegate.producers.client import Sluice
from sluicegate.shared.accounts import find_account
from sluicegate.shared.ids import new_id
from sluicegate.shared.settings import Settings
from tests.databases import Rows
from tests.http_calling import bearing, calling, new_key


@pytest.fixture
def victim(engine: Engine, rows: Rows) -> str:
    """Return the id of the default account, which is another one's name, from before names were
    checked for that.
    """
    with engine.connect() as connection:
        id_ = str(find_account(connection, "default").id)
    rows("INSERT INTO accounts (id, name) VALUES (%(id)s, %(name)s)", id=new_id(), name=id_)
    return id_


def test_who_looks_up_an_id_finds_it(settings: Settings, engine: Engine, victim: str) -> None:
    with engine.connect() as connection:
        assert find_account(connection, victim).name == "default"
    with Sluice(settings) as client:
        handle = client.submit("draft", "hi", account=victim)
        assert str(client.get(handle.id).account_id) == victim
        assert [job.id for job in client.list_jobs(account=victim)] == [handle.id]


async def test_a_key_opens_for_the_account_of_its_id(
    settings: Settings, engine: Engine, rows: Rows, victim: str
) -> None:
    _, owner = new_key(engine, role="owner", account="default")
    _, service = new_key(engine, role="owner", account=None)
    async with calling(settings) as client:
        for headers in (bearing(owner), bearing(service, account=victim)):
            job = {"use_case": "draft", "prompt": "hi"}
            (id_,) = (await client.post("/api/jobs", json=job, headers=headers)).json()["ids"]
            ((whose,),) = rows("SELECT account_id FROM jobs WHERE id = %(id)s", id=id_)
            assert str(whose) == victim
