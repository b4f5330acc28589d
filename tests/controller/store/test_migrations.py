"""The migration scripts on databases that hold data, of both kinds: nothing is lost, the tables come out right."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from populated import contents, fill
from sqlalchemy import Engine, inspect

from controller.store import migrate
from controller.store.errors import StoreError
from controller.store.opening import Store, make_engine
from controller.store.schema import metadata


@pytest.fixture
def migrator(any_store: Store) -> Iterator[Engine]:
    engine = make_engine(any_store.url, writes=True, foreign_keys=False)
    yield engine
    engine.dispose()


def test_scripts_make_the_tables_of_the_schema(any_store: Store) -> None:
    with any_store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_comparison_would_find_a_difference(any_store: Store) -> None:
    with any_store.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE marks ADD COLUMN surplus INTEGER")
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) != []


def test_down_and_up_again_on_a_populated_database(any_store: Store, migrator: Engine) -> None:
    fill(any_store.engine)
    with any_store.reader.connect() as connection:
        before = contents(connection)
    assert all(before.values())
    migrate.upgrade(migrator)
    with any_store.reader.connect() as connection:
        assert contents(connection) == before
    migrate.downgrade(migrator, "base")
    with any_store.reader.connect() as connection:
        assert not set(metadata.tables) & set(inspect(connection).get_table_names())
    migrate.upgrade(migrator)
    fill(any_store.engine)
    with any_store.reader.connect() as connection:
        assert contents(connection) == before


def alter_parent(engine: Engine) -> None:
    """What a later script may do: alter a table that others refer to. SQLite has to make it anew."""
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection, opts={"render_as_batch": True}))
        with operations.batch_alter_table("generations", recreate="always") as batch:
            batch.add_column(sa.Column("note", sa.Text()))


def test_altering_a_parent_keeps_its_children(store: Store) -> None:
    fill(store.engine)
    engine = make_engine(store.url, writes=True, foreign_keys=False)
    alter_parent(engine)
    engine.dispose()
    with store.reader.connect() as connection:
        assert contents(connection)["placements"]


def test_with_foreign_keys_on_the_pitfall_is_real(store: Store) -> None:
    """The control: the same with foreign keys on fails or deletes the children, which is why `upgrade` has them off."""
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE placements")
        connection.exec_driver_sql(
            "CREATE TABLE placements (job TEXT, generation BIGINT, rank INTEGER, node TEXT, device TEXT, pid INTEGER, "
            "FOREIGN KEY (job, generation) REFERENCES generations (job, generation) ON DELETE CASCADE)"
        )
    fill(store.engine)
    alter_parent(store.engine)
    with store.reader.connect() as connection:
        assert contents(connection)["placements"] == []


def test_a_migration_that_leaves_dangling_references_is_undone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store.engine)
    engine = make_engine(store.url, writes=True, foreign_keys=False)

    def bad(config: object, _revision: str) -> None:
        connection = config.attributes["connection"]  # type: ignore[attr-defined]
        connection.exec_driver_sql("DELETE FROM generations")

    monkeypatch.setattr(migrate.command, "upgrade", bad)
    with pytest.raises(StoreError, match="dangling references, first in placements"):
        migrate.upgrade(engine)
    engine.dispose()
    with store.reader.connect() as connection:
        assert contents(connection)["generations"]
