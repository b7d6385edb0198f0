"""How Alembic reaches the database: one migration at a time, each run all or nothing."""

from alembic import context
from alembic.util import CommandError

from sluicegate.shared.errors import SluiceError
from sluicegate.shared.migrations import LOCK_KEY, exclusive_connection, make_schema
from sluicegate.shared.settings import Settings, load_settings
from sluicegate.shared.tables import metadata

_AUTOGENERATE_PLUGINS = ["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname"]


def _settings() -> Settings:
    """Take the settings of whoever called us from Python, else those of the environment."""
    given = context.config.attributes.get("settings")
    if isinstance(given, Settings):
        return given
    try:
        return load_settings()
    except SluiceError as error:
        raise CommandError(str(error)) from None


def _run_online() -> None:
    settings = _settings()
    with exclusive_connection(settings) as connection:
        context.configure(
            connection=connection,
            target_metadata=metadata,
            autogenerate_plugins=_AUTOGENERATE_PLUGINS,
        )
        with context.begin_transaction():
            make_schema(connection, settings)
            context.run_migrations()


def _run_offline() -> None:
    """Write SQL for somebody else to run, with the same lock."""
    schema = _settings().database_schema
    context.configure(
        dialect_name="postgresql",
        target_metadata=metadata,
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
    )
    with context.begin_transaction():
        context.execute(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
        context.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        context.execute(f"SET LOCAL search_path = {schema}")
        context.run_migrations()


if context.config.config_file_name is not None:
    from logging.config import fileConfig

    fileConfig(context.config.config_file_name, disable_existing_loggers=False)

if context.is_offline_mode():
    _run_offline()
else:
    _run_online()
