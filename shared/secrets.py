"""Secrets: a text that is never shown, and the keyring that encrypts what the database keeps.

`SLUICE_ENCRYPTION_KEYS` holds Fernet keys, the newest first. The first encrypts, all decrypt: a
new key is put in front, `sluice secrets rotate` encrypts everything with it, and only then the old
one goes.
"""

# The library takes 50 ms to import, and who submits jobs never needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Final, NoReturn, Self, SupportsIndex

from pydantic import GetCoreSchemaHandler, SecretStr
from pydantic_core import SchemaSerializer, core_schema

from sluicegate.shared.errors import SettingsError, SluiceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.fernet import Fernet, MultiFernet

    from sluicegate.shared.settings import Settings

_VARIABLE: Final = "SLUICE_ENCRYPTION_KEYS"
_HIDDEN: Final = "***"
#: 32 bytes as Fernet wants them; its own reader passes over characters that do not belong there.
_FERNET_KEY = re.compile(r"[A-Za-z0-9_-]{43}=")
_MAX_OPENED = 1024
_FINGERPRINT_CHARS: Final = 8


#: Of its own, as pydantic's shows ten stars.
_DUMP = core_schema.to_string_ser_schema(when_used="json-unless-none")


class Secret(SecretStr):
    """A text that shows as `***` wherever it is printed, logged or dumped.

    `get_secret_value()` reads it. It cannot be pickled.
    """

    __pydantic_serializer__ = SchemaSerializer(core_schema.any_schema(serialization=_DUMP))

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[object], handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Validate as pydantic's own does, and dump as `***`."""
        return core_schema.no_info_wrap_validator_function(
            lambda value, read: cls(read(value).get_secret_value()),
            super().__get_pydantic_core_schema__(SecretStr, handler),
            serialization=_DUMP,
        )

    def _display(self) -> str:
        return _HIDDEN

    def __repr__(self) -> str:
        return _HIDDEN

    def __format__(self, spec: str) -> str:
        return format(_HIDDEN, spec)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _known: object) -> Self:
        return self

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a secret cannot be pickled")


class SecretUnreadable(SluiceError):
    """SLUICE_ENCRYPTION_KEYS does not hold the key that this was encrypted with."""


def new_key() -> Secret:
    """Make a key for `SLUICE_ENCRYPTION_KEYS`."""
    from cryptography.fernet import Fernet

    return Secret(Fernet.generate_key().decode())


class Keyring:
    """Encrypts with the first of its keys and decrypts with all of them.

    Raises SettingsError, which names the position of a key that is none and never its value.
    Without any key it can be made, but neither encrypts nor decrypts.
    """

    def __init__(self, keys: Sequence[Secret]) -> None:
        for number, key in enumerate(keys, 1):
            if not _FERNET_KEY.fullmatch(key.get_secret_value()):
                raise SettingsError(
                    f"{_VARIABLE}: key {number} of {len(keys)} is not a Fernet key; "
                    "`sluice secrets new-key` prints one"
                )
        #: What tells its keys from others, the newest first, and gives none of them away.
        self.fingerprints = tuple(
            sha256(key.get_secret_value().encode()).hexdigest()[:_FINGERPRINT_CHARS] for key in keys
        )
        self._newest: Fernet | None = None
        self._all: MultiFernet | None = None
        if keys:
            # Seven megabytes that a fleet with its keys in the environment need not carry.
            from cryptography.fernet import Fernet, MultiFernet

            fernets = [Fernet(key.get_secret_value()) for key in keys]
            self._newest, self._all = fernets[0], MultiFernet(fernets)
        # Each job asks for a key, and there are few of them.
        self._opened = lru_cache(_MAX_OPENED)(self._open)

    @classmethod
    def of(cls, settings: Settings) -> Keyring:
        """Make the keyring of `SLUICE_ENCRYPTION_KEYS`; raises SettingsError."""
        return cls.read(settings.encryption_keys)

    @classmethod
    def read(cls, given: SecretStr | None) -> Keyring:
        """Make the keyring of what `SLUICE_ENCRYPTION_KEYS` is; raises SettingsError."""
        if given is None:
            return cls(())
        return cls([Secret(key.strip()) for key in given.get_secret_value().split(",")])

    def check(self) -> None:
        """Raise SettingsError if there is no key to encrypt with."""
        if self._all is None:
            raise SettingsError(
                f"{_VARIABLE} is not set, and a key of a provider is never stored in the clear; "
                "run `sluice secrets new-key` and set it for the workers too"
            )

    def encrypt(self, text: str | Secret) -> str:
        """Encrypt with the newest key; raises SettingsError if there is none."""
        self.check()
        assert self._all is not None
        plain = text.get_secret_value() if isinstance(text, SecretStr) else text
        return self._all.encrypt(plain.encode()).decode()

    def decrypt(self, token: str) -> Secret:
        """Decrypt what `encrypt` returned; raises SecretUnreadable if no key of ours fits."""
        return self._opened(token)

    def seal(self, data: bytes) -> str:
        """Encrypt a body; as `encrypt`."""
        self.check()
        assert self._newest is not None
        return self._newest.encrypt(data).decode()

    def open(self, token: str) -> bytes:
        """Decrypt what `seal` returned, and remember nothing; raises SecretUnreadable."""
        from cryptography.fernet import InvalidToken

        if self._all is None:
            raise SecretUnreadable
        try:
            return self._all.decrypt(token)
        except InvalidToken:
            raise SecretUnreadable from None

    def rotate(self, token: str) -> str:
        """Encrypt anew with the newest key; what is encrypted with it already comes back as it is.

        Raises SecretUnreadable if no key of ours fits.
        """
        from cryptography.fernet import InvalidToken

        if self._newest is None or self._all is None:
            raise SecretUnreadable
        try:
            self._newest.decrypt(token.encode())
        except InvalidToken:
            try:
                return self._all.rotate(token.encode()).decode()
            except InvalidToken:
                raise SecretUnreadable from None
        return token

    def _open(self, token: str) -> Secret:
        from cryptography.fernet import InvalidToken

        if self._all is None:
            raise SecretUnreadable
        try:
            return Secret(self._all.decrypt(token.encode()).decode())
        except InvalidToken:
            raise SecretUnreadable from None
