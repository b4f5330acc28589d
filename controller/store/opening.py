"""Opens the database: engines with the right settings, migrated to this version, or one clear line why not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, create_engine, delete, event, false
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from controller.store import migrate
from controller.store.errors import StoreError
from controller.store.schema import leases

# How long a SQLite connection waits for another process's transaction: ours take milliseconds, a copy of the
# database by an operator's tool may take seconds.
BUSY_TIMEOUT_MS = 5000
# How long to wait for PostgreSQL to answer a connection, in seconds.
CONNECT_TIMEOUT_S = 5


def database_url(directory: Path) -> str:
    """Name the default database of a run directory."""
    return f"sqlite:///{directory.absolute() / 'assay.db'}"


@dataclass(frozen=True, slots=True)
class Store:
    """An open database: `engine` writes (one thread uses it), `reader` never does."""

    url: URL
    engine: Engine
    reader: Engine

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()
        self.reader.dispose()


def open_store(url: str, create: bool = True) -> Store:
    """Open the database at `url` ("sqlite:///PATH", "postgresql://..."), which must be at this version's revision.

    With `create`, it is made or migrated, and proven writable; without, it is only read.
    Raises StoreError: unknown URL, unreachable, not a database, not writable, from a newer version, no room.
    """
    parsed = _parse(url)
    if not create and parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        raise StoreError(f"no database at {parsed.database}")
    with told(parsed):
        store = Store(parsed, make_engine(parsed, writes=True), make_engine(parsed, writes=False))
        try:
            _prepare(store, create)
        except BaseException:
            store.close()
            raise
    return store


@contextmanager
def told(url: URL) -> Iterator[None]:
    """Turn what the database's driver raises inside into a StoreError of one line."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreError(_line(url, error)) from error


def make_engine(url: URL, *, writes: bool, foreign_keys: bool = True) -> Engine:
    """Make an engine; on SQLite with WAL, full synchronisation and, unless told otherwise, foreign keys."""
    if url.get_backend_name() != "sqlite":
        arguments = {"connect_timeout": CONNECT_TIMEOUT_S}
        if not writes:
            return create_engine(url, connect_args={**arguments, "options": "-c default_transaction_read_only=on"})
        return create_engine(url, connect_args=arguments)
    engine = create_engine(url)
    pragmas = [f"busy_timeout={BUSY_TIMEOUT_MS}", f"foreign_keys={'ON' if foreign_keys else 'OFF'}"]
    pragmas += ["journal_mode=WAL", "synchronous=FULL"] if writes else ["query_only=ON"]
    _configure_sqlite(engine, pragmas, "BEGIN IMMEDIATE" if writes else "BEGIN")
    return engine


def _configure_sqlite(engine: Engine, pragmas: list[str], begin: str) -> None:
    def on_connect(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
        # The driver's own implicit transactions would start too late and swallow our BEGIN.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))


def _prepare(store: Store, create: bool) -> None:
    """Bring the database to our revision (`create`) or check that it is there."""
    with store.engine.connect() if create else store.reader.connect() as connection:
        found = migrate.current(connection)
    migrate.check(found, str(store.url.render_as_string()), may_migrate=create)
    if not create:
        return
    if found != migrate.HEAD:
        migrator = make_engine(store.url, writes=True, foreign_keys=False)
        try:
            migrate.upgrade(migrator)
        finally:
            migrator.dispose()
    with store.engine.begin() as connection:
        connection.execute(delete(leases).where(false()))


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise StoreError(f"unknown kind of database {parsed.get_backend_name()!r}: use sqlite or postgresql")
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise StoreError(f"not a database URL: {url!r}: use sqlite:///PATH or postgresql://USER@HOST/NAME") from error
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError("the database must be a file: use sqlite:///PATH")
    return parsed


def _line(url: URL, error: SQLAlchemyError) -> str:
    """Say in one line what is wrong with the database at `url`."""
    where = url.database if url.get_backend_name() == "sqlite" else url.render_as_string()
    said = str(error.orig if isinstance(error, DBAPIError) else error).strip().splitlines()
    cause = said[0] if said else type(error).__name__
    if "full" in cause and isinstance(error, OperationalError):
        return f"no room left for the database {where}: {cause}"
    if any(words in cause for words in ("readonly", "read-only", "unable to open", "permission denied")):
        return f"the database {where} is not writable: {cause}"
    if "not a database" in cause:
        return f"{where} is not an Assay database: {cause}"
    return f"the database {where} cannot be used: {cause}"
