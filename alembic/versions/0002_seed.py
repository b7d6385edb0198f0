"""What every database starts with: an account, the use cases, and the rows of both catalogues.

Checked on 2026-11-22 against what is published with openai 3.54 (shutdown dates beside its list of
chat models), anthropic 2.12 (`DEPRECATED_MODELS`) and genai-prices 0.2.3 (`context_window`). A row
that an operator has added under the same name stays as it is.
"""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP, array, insert

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TEXTS = ARRAY(sa.Text())

_ACCOUNTS = sa.table("accounts", sa.column("id", sa.Uuid()), sa.column("name", sa.Text()))

_USE_CASES = sa.table(
    "use_cases",
    sa.column("name", sa.Text()),
    sa.column("description", sa.Text()),
    sa.column("prefer", sa.Text()),
    sa.column("max_tokens", sa.Integer()),
    sa.column("unknown_policy", sa.Text()),
)

_PROVIDERS = sa.table(
    "llm_providers",
    sa.column("id", sa.Uuid()),
    sa.column("name", sa.Text()),
    sa.column("provider", sa.Text()),
    sa.column("model", sa.Text()),
    sa.column("is_default", sa.Boolean()),
    sa.column("use_case", _TEXTS),
    sa.column("failover", _TEXTS),
    sa.column("max_tokens", sa.Integer()),
    sa.column("context_tokens", sa.Integer()),
    sa.column("capabilities", _TEXTS),
    sa.column("catalogue", sa.Text()),
    sa.column("retires_at", TIMESTAMP(timezone=True)),
    sa.column("successor", sa.Text()),
)

#: Tables whose rows name an account for good.
_BEARERS = [sa.table(name, sa.column("account_id", sa.Uuid())) for name in ("jobs", "cost_entries")]

DEFAULT_ACCOUNT = UUID("00000000-0000-7000-8000-000000000001")


def _use_case(
    name: str, description: str, *, max_tokens: int, prefer: str = "priority"
) -> dict[str, Any]:
    return {
        "name": name,
        "description": description,
        "prefer": prefer,
        "max_tokens": max_tokens,
        "unknown_policy": "retry_once",
    }


USE_CASE_ROWS = [
    _use_case("draft", "Write an email, a message or a follow-up.", max_tokens=1024),
    _use_case("summary", "Condense notes, calls, threads and documents.", max_tokens=1024),
    _use_case("complex", "Reason in several steps, analyse, plan, decide.", max_tokens=4096),
    _use_case("vision", "Read images, scans and documents with a layout.", max_tokens=1024),
    _use_case(
        "voice",
        "Answer somebody who is listening: the first word counts.",
        max_tokens=512,
        prefer="fastest",
    ),
    _use_case("general", "Everything that has no use case of its own.", max_tokens=1024),
]


def _provider(
    number: int,
    name: str,
    model: str,
    *,
    catalogue: str,
    use_case: list[str],
    context_tokens: int,
    failover: list[str] | None = None,
    # Neither SDK says how long an answer of the newer models may be: what the older ones give.
    max_tokens: int = 64_000,
    retires_at: datetime | None = None,
    successor: str | None = None,
    is_default: bool = False,
) -> dict[str, Any]:
    """Make a row; ids are fixed so that reports of several fleets can be joined."""
    capabilities = ["vision", "tools", "json_schema"]
    if catalogue == "current":
        capabilities.append("effort")
    return {
        "id": UUID(f"00000000-0000-7000-8000-{number:012x}"),
        "name": name,
        "provider": name.partition("-")[0],
        "model": model,
        "is_default": is_default,
        "use_case": use_case,
        "failover": failover or [],
        "max_tokens": max_tokens,
        "context_tokens": context_tokens,
        "capabilities": capabilities,
        "catalogue": catalogue,
        "retires_at": retires_at,
        "successor": successor,
    }


PROVIDER_ROWS = [
    _provider(
        0x101,
        "anthropic-claude-haiku-5-5",
        "claude-haiku-5-5",
        catalogue="current",
        use_case=["draft", "summary"],
        failover=["voice", "general"],
        context_tokens=1_000_000,
    ),
    _provider(
        0x102,
        "anthropic-claude-sonnet-5-5",
        "claude-sonnet-5-5",
        catalogue="current",
        use_case=["complex"],
        failover=["vision"],
        context_tokens=1_000_000,
    ),
    _provider(
        0x103,
        "openai-gpt-6.1-sol",
        "gpt-6.1-sol",
        catalogue="current",
        use_case=["vision"],
        failover=["complex"],
        context_tokens=1_050_000,
    ),
    _provider(
        0x104,
        "openai-gpt-6-luna",
        "gpt-6-luna",
        catalogue="current",
        use_case=["voice", "general"],
        failover=["draft", "summary"],
        context_tokens=1_050_000,
        is_default=True,
    ),
    _provider(
        0x201,
        "anthropic-claude-haiku-4-5",
        "claude-haiku-4-5",
        catalogue="original",
        use_case=["draft", "summary"],
        context_tokens=200_000,
        successor="anthropic-claude-haiku-5-5",
    ),
    _provider(
        0x202,
        "anthropic-claude-sonnet-4-5",
        "claude-sonnet-4-5",
        catalogue="original",
        use_case=["complex"],
        context_tokens=200_000,
        retires_at=datetime(2026, 11, 30, tzinfo=UTC),
        successor="anthropic-claude-sonnet-5-5",
    ),
    _provider(
        0x203,
        "openai-gpt4o",
        "gpt-4o",
        catalogue="original",
        use_case=["vision"],
        context_tokens=128_000,
        max_tokens=16_384,
        retires_at=datetime(2027, 1, 14, tzinfo=UTC),
        successor="openai-gpt-6.1-sol",
    ),
    _provider(
        0x204,
        "openai-gpt4o-mini",
        "gpt-4o-mini",
        catalogue="original",
        use_case=["voice", "general"],
        context_tokens=128_000,
        max_tokens=16_384,
        retires_at=datetime(2027, 1, 14, tzinfo=UTC),
        successor="openai-gpt-6-luna",
        is_default=True,
    ),
]


def _stored(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: array(value, type_=sa.Text()) if isinstance(value, list) else value
        for name, value in row.items()
    }


def upgrade() -> None:
    """Add the rows that are not there yet."""
    op.execute(
        insert(_ACCOUNTS).values(id=DEFAULT_ACCOUNT, name="default").on_conflict_do_nothing()
    )
    op.execute(insert(_USE_CASES).values(USE_CASE_ROWS).on_conflict_do_nothing())
    rows = [_stored(row) for row in PROVIDER_ROWS]
    op.execute(insert(_PROVIDERS).values(rows).on_conflict_do_nothing())


def downgrade() -> None:
    """Take the rows away; the account stays if it has jobs or costs, which name it."""
    op.execute(_PROVIDERS.delete().where(_PROVIDERS.c.id.in_([row["id"] for row in PROVIDER_ROWS])))
    op.execute(
        _USE_CASES.delete().where(_USE_CASES.c.name.in_([row["name"] for row in USE_CASE_ROWS]))
    )
    op.execute(
        _ACCOUNTS.delete().where(
            _ACCOUNTS.c.id == DEFAULT_ACCOUNT,
            *(~sa.exists().where(table.c.account_id == _ACCOUNTS.c.id) for table in _BEARERS),
        )
    )
