"""Commands for the providers' keys: `sluice secrets new-key|set|list|remove|rotate`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sluicegate.shared.connecting import catalogue_change, connection
from sluicegate.shared.errors import NotFound, SettingsError, SluiceError
from sluicegate.shared.secrets import Keyring, Secret
from sluicegate.shared.settings import get_settings
from sluicegate.shared.terminal import AsJson, console, moment, note, print_json, print_table

if TYPE_CHECKING:
    from sluicegate.shared.provider_keys import KeyState, Readers, Rotation, StoredKey

app = typer.Typer(pretty_exceptions_enable=False)
secrets = typer.Typer(
    no_args_is_help=True, help="Keys of the providers, kept encrypted in the database."
)
app.add_typer(secrets, name="secrets")

Pool = Annotated[Literal["openai", "anthropic"], typer.Argument(help="Whose API the key opens.")]
Account = Annotated[str | None, typer.Option(metavar="NAME", help="For this account only.")]

#: The longest key that is read; real ones take 200 characters.
_MAX_KEY_CHARS = 4096

_WHO_HAS_THEM = "workers that have this SLUICE_ENCRYPTION_KEYS"

_NEW_KEY = """\
put it in front of the keys that are there: SLUICE_ENCRYPTION_KEYS=<this one>,<the others>
sluice: restart the workers with that, run `sluice secrets rotate`, then take the old ones away"""


@secrets.command("new-key", epilog="Example: sluice secrets new-key")
def new_key() -> None:
    """Print a new key for SLUICE_ENCRYPTION_KEYS; it is stored nowhere."""
    from sluicegate.shared import secrets as made

    typer.echo(made.new_key().get_secret_value())
    note(_NEW_KEY)


@secrets.command("set", epilog="Example: sluice secrets set openai --account acme < key.txt")
def set_key(pool: Pool, *, account: Account = None) -> None:
    """Store a key, read from a hidden prompt or standard input, never from an argument."""
    from sluicegate.shared import provider_keys
    from sluicegate.shared.accounts import account_id_of

    settings = get_settings()
    keyring = Keyring.of(settings)
    keyring.check()
    token = keyring.encrypt(read_key(pool))
    with catalogue_change() as line:
        provider_keys.set_key(line, pool, account_id_of(line, account), token)
        readers = provider_keys.readers(line, keyring, pool)
    who = "workers" if readers.live and not readers.without else _WHO_HAS_THEM
    note(f"the {pool} key is stored for {account or 'every account'}; {who} use it from now on")
    warn_of(readers)
    if account is None and provider_keys.environment_key(settings, pool):
        variable = provider_keys.KEY_VARIABLES[pool]
        note(f"{variable} is set here, and workers that have it in their environment use that")


@secrets.command("remove", epilog="Example: sluice secrets remove openai --account acme")
def remove(pool: Pool, *, account: Account = None) -> None:
    """Remove a key from the database."""
    from sluicegate.shared.accounts import account_id_of
    from sluicegate.shared.provider_keys import remove_key

    whom = f"account {account}" if account else "every account"
    with catalogue_change() as line:
        if not remove_key(line, pool, account_id_of(line, account)):
            raise NotFound(
                f"there is no {pool} key for {whom}; `sluice secrets list` shows those that are"
            )
    note(f"the {pool} key for {whom} is removed")


@secrets.command("list", epilog="Example: sluice secrets list --json")
def list_all(*, as_json: AsJson = False) -> None:
    """List which keys there are, and none of them itself."""
    from sluicegate.shared import provider_keys

    settings = get_settings()
    keyring = Keyring.of(settings)
    with connection() as line:
        stored = provider_keys.list_keys(line)
    states = [provider_keys.state_of(key.token, keyring) for key in stored]
    present = [
        pool
        for pool in provider_keys.KEY_VARIABLES
        if provider_keys.environment_key(settings, pool)
    ]
    if as_json:
        in_database = [
            {
                "pool": key.pool,
                "provider": key.provider,
                "account": key.account,
                "kept_in": "database",
                "state": state,
                "updated_at": key.updated_at.isoformat(),
            }
            for key, state in zip(stored, states, strict=True)
        ]
        here = [{"pool": pool, "kept_in": "environment"} for pool in present]
        print_json({"keys": [*here, *in_database]})
        return
    print_table(
        ("pool", "provider", "account", "kept in", "encrypted with", "changed"),
        [
            *((pool, "", "", provider_keys.KEY_VARIABLES[pool], "", "") for pool in present),
            *map(_line, stored, states),
        ],
    )


_WORDS = {
    "current": "the newest key",
    "older": "an older key",
    "unreadable": "a key that is not here",
}


def _line(key: StoredKey, state: KeyState) -> tuple[str, ...]:
    return (
        key.pool,
        key.provider or "",
        key.account or "",
        "the database",
        _WORDS[state],
        moment(key.updated_at),
    )


@secrets.command("rotate", epilog="Example: sluice secrets rotate")
def rotate() -> None:
    """Encrypt all that is encrypted in the database anew with the first of SLUICE_ENCRYPTION_KEYS.

    Keys, and requests and answers. Work goes on meanwhile. Exits with 1 if something cannot be
    decrypted: the key that it needs must not go then.
    """
    from sluicegate.shared import provider_keys
    from sluicegate.shared.catalogue import announce
    from sluicegate.shared.resealing import reseal

    settings = get_settings()
    keyring = Keyring.of(settings)
    keyring.check()
    with connection() as line, console(stderr=True).status("Encrypting") as status:

        def progress(done: Rotation) -> None:
            status.update(f"Encrypting: {done.renewed + done.current + done.unreadable} keys")

        done = provider_keys.rotate(line, keyring, progress=progress)
        stored = provider_keys.list_keys(line) if done.unreadable else []
        signing = provider_keys.list_alert_secrets(line) if done.unreadable else []

        def resealed(so_far: Rotation) -> None:
            status.update(f"Encrypting: {so_far.renewed + so_far.current:,} requests and answers")

        bodies = reseal(line, keyring, progress=resealed)
        readers = provider_keys.readers(line, keyring)
    told = announce(settings)
    typer.echo(
        f"{done.renewed} encrypted anew, {done.current} with the newest key already, "
        f"{done.unreadable} unreadable"
    )
    if bodies.renewed or bodies.current or bodies.unreadable:
        typer.echo(
            f"requests and answers: {bodies.renewed:,} encrypted anew, {bodies.current:,} with the "
            f"newest key already, {bodies.unreadable:,} unreadable"
        )
    if not told:
        note(
            "Redis did not answer: workers read the keys again within "
            f"{settings.catalogue_ttl_s:g} s (SLUICE_CATALOGUE_TTL_S), so keep the old key as long"
        )
    warn_of(readers)
    if done.unreadable:
        tokens = [(str(key), key.token) for key in stored]
        tokens += [(f"the alert secret of account {name}", token) for name, token in signing]
        names = [
            name
            for name, token in tokens
            if provider_keys.state_of(token, keyring) is provider_keys.KeyState.UNREADABLE
        ]
        raise SluiceError(
            "SLUICE_ENCRYPTION_KEYS does not hold what these are encrypted with, so set them "
            f"anew or add it: {', '.join(names)}"
        )
    if bodies.unreadable:
        raise SluiceError(
            f"SLUICE_ENCRYPTION_KEYS does not hold what {bodies.unreadable:,} requests and answers "
            "are encrypted with; add that key, and keep it until they are purged or encrypted anew"
        )


def warn_of(readers: Readers) -> None:
    """Say which workers cannot decrypt what has just been encrypted, and what to do."""
    from sluicegate.shared.provider_keys import GIVE_KEY

    if readers.problem:
        note(f"{readers.problem}, so jobs that need it fail there: {GIVE_KEY}")


def read_key(pool: str) -> Secret:
    """Read a key from a hidden prompt, or from standard input; raises SettingsError."""
    from sluicegate.shared.provider_keys import is_sendable

    if sys.stdin.isatty():
        given = typer.prompt(f"Key of {pool}", hide_input=True)
    else:
        given = sys.stdin.read(_MAX_KEY_CHARS + 1)
    key = Secret(given.strip())
    if not key:
        raise SettingsError("no key was given; type it at the prompt, or pipe it in")
    if len(given) > _MAX_KEY_CHARS or not is_sendable(key):
        raise SettingsError("this is not a key: it must be one line of printable ASCII characters")
    return key
