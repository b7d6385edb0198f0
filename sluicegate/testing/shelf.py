"""Jobs by idempotency key, and accounts by name: what Postgres finds by an index."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Final
from uuid import UUID, uuid5

from sluicegate.producers.storing import Stored, accept
from sluicegate.producers.submission import Draft
from sluicegate.shared.accounts import DEFAULT_ACCOUNT
from sluicegate.testing.job import FakeJob

#: Ids of accounts that exist only in a test.
_ACCOUNTS: Final = UUID("6d1c9a52-6d0c-5b3e-9f7d-0c8f3c1f0a11")


class Accounts(Mapping[str, UUID]):
    """Accounts by name or id; unless they are listed, all that are asked for exist."""

    def __init__(self, names: Collection[str] | None, default_id: UUID) -> None:
        self._open = names is None
        self._ids = {DEFAULT_ACCOUNT: default_id}
        for name in names or ():
            self._ids.setdefault(name, uuid5(_ACCOUNTS, name))
        self._names = {account_id: name for name, account_id in self._ids.items()}

    def name(self, account_id: UUID) -> str:
        """Return the name of an account that was found before."""
        return self._names[account_id]

    def __getitem__(self, name: str) -> UUID:
        with suppress(ValueError):
            account_id = UUID(name)
            if self._open:
                self._names.setdefault(account_id, name)
            if account_id in self._names:
                return account_id
        if name not in self._ids and self._open:
            account_id = self._ids[name] = uuid5(_ACCOUNTS, name)
            self._names[account_id] = name
        return self._ids[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


class Shelf:
    """The jobs there are and those of one submission, by idempotency key."""

    def __init__(self, jobs: Mapping[UUID, FakeJob]) -> None:
        self.new: dict[UUID, FakeJob] = {}
        self._by_key = {_key(job.draft): job for job in jobs.values()}

    def add(self, job: FakeJob) -> None:
        """Put a new job there."""
        self.new[job.id] = self._by_key[_key(job.draft)] = job

    def standing(self, draft: Draft) -> FakeJob | None:
        """Return the job that has the draft's idempotency key already."""
        return self._by_key.get(_key(draft))

    def accepted(self, draft: Draft) -> UUID:
        """Return which job the draft is; raise `IdempotencyConflict`."""
        if draft.id in self.new:
            return draft.id
        job = self._by_key[_key(draft)]
        row = Stored(
            id=job.id,
            published_at=None,
            draft_id=draft.id,
            state=job.state,
            request_hash=job.draft.request_hash,
        )
        (accepted,) = accept([draft], (), [row])
        return accepted.id


def _key(draft: Draft) -> object:
    return (draft.account_id, draft.idempotency_key) if draft.idempotency_key else draft.id
