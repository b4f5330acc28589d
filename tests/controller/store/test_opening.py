"""Opening a database: made, migrated, recognised as newer, or refused with one clear line."""

from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import DBAPIError

from controller.store import migrate
from controller.store.errors import StoreError
from controller.store.opening import Store, database_url, open_store, told
from controller.store.schema import metadata


def refused(url: str, create: bool = True) -> str:
    with pytest.raises(StoreError) as caught:
        open_store(url, create=create).close()
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_open_makes_every_table_and_opens_again(empty_url: str) -> None:
    for create in (True, True, False):
        store = open_store(empty_url, create=create)
        assert set(inspect(store.reader).get_table_names()) == {*metadata.tables, "alembic_version"}
        store.close()


def test_reader_cannot_write(any_store: Store) -> None:
    with pytest.raises(DBAPIError, match=r"read-?only|readonly"), any_store.reader.begin() as connection:
        connection.execute(text("DELETE FROM leases"))


def test_sqlite_settings(store: Store) -> None:
    names = ("journal_mode", "synchronous", "foreign_keys")
    with store.engine.connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]
    assert found == ["wal", 2, 1]


def test_newer_version_is_refused(empty_url: str) -> None:
    store = open_store(empty_url)
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    for create in (True, False):
        assert "newer version of Assay (revision 9999" in refused(empty_url, create)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "not a database URL"),
        ("mysql://host/name", "unknown kind of database"),
        ("sqlite://", "must be a file"),
        ("sqlite:////nowhere/at/all.db", "not writable"),
        ("sqlite:////tmp", "not writable"),
        ("postgresql://assay@127.0.0.1:1/none", "cannot be used"),
    ],
)
def test_refusals(url: str, said: str) -> None:
    assert said in refused(url)


def test_password_is_never_shown() -> None:
    assert "secret" not in refused("postgresql://assay:secret@127.0.0.1:1/none")


def test_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "assay.db").write_bytes(b"not a database at all, but long enough to have a header" * 10)
    assert "is not an Assay database" in refused(database_url(tmp_path))


def test_missing_or_empty_database_is_not_made_by_readers(tmp_path: Path) -> None:
    assert "no database at" in refused(database_url(tmp_path), create=False)
    assert not (tmp_path / "assay.db").exists()
    (tmp_path / "assay.db").touch()
    assert "has no Assay tables" in refused(database_url(tmp_path), create=False)


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    """A page limit makes SQLite answer as a full disk does."""
    store = open_store(database_url(tmp_path))
    with store.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=1")
        connection.rollback()
        with pytest.raises(StoreError, match="no room left for the database"), told(store.url):
            connection.exec_driver_sql("CREATE TABLE filler AS SELECT randomblob(1000000)")
    store.close()


def test_head_is_the_newest_script() -> None:
    with create_engine("sqlite://").connect() as connection:
        assert ScriptDirectory.from_config(migrate.config(connection)).get_current_head() == migrate.HEAD
