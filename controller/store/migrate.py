"""Brings a database to this version's tables, and recognises one that is newer."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, MetaData, Table, inspect, select

import migrations
from controller.store.errors import StoreError

# The revision of `schema.py`. A test compares it with the newest script, so that opening need not load the scripts.
HEAD = "0002"


def config(connection: Connection) -> Config:
    """Make alembic's configuration for a connection that the caller owns."""
    made = Config()
    made.set_main_option("script_location", str(Path(migrations.__file__).parent))
    made.attributes["connection"] = connection
    return made


def current(connection: Connection) -> str | None:
    """Read the revision of the database; None if it has none yet."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    table = Table("alembic_version", MetaData(), autoload_with=connection)
    found = connection.execute(select(table.c.version_num)).scalar()
    return None if found is None else str(found)


def check(found: str | None, where: str, may_migrate: bool) -> None:
    """Raise StoreError unless revision `found` is ours, or one that we may migrate."""
    if found == HEAD:
        return
    if found is not None and found not in known():
        raise StoreError(
            f"the database {where} is from a newer version of Assay (revision {found}, this one knows {HEAD}): "
            "use that version or another database"
        )
    if not may_migrate:
        raise StoreError(
            f"the database {where} has no Assay tables"
            if found is None
            else f"the database {where} is from an older version of Assay (revision {found}): "
            "run `assay-controller serve --dir DIR` on it once, which migrates it"
        )


def known() -> set[str]:
    """List the revisions that this version has scripts for."""
    made = Config()
    made.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return {script.revision for script in ScriptDirectory.from_config(made).walk_revisions()}


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Migrate up to `revision` in one transaction. `engine` must have SQLite's foreign keys off."""
    with engine.begin() as connection:
        command.upgrade(config(connection), revision)
        _check_foreign_keys(connection)


def downgrade(engine: Engine, revision: str) -> None:
    """Migrate down to `revision` in one transaction, under the same condition as `upgrade`."""
    with engine.begin() as connection:
        command.downgrade(config(connection), revision)
        _check_foreign_keys(connection)


def _check_foreign_keys(connection: Connection) -> None:
    """Find dangling references before the commit: SQLite did not look while foreign keys were off.

    They must be off, because altering a parent table there means making it anew, and dropping the old one with foreign
    keys on deletes its children.
    """
    if connection.dialect.name != "sqlite":
        return
    dangling = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
    if dangling:
        raise StoreError(f"the migration would leave {len(dangling)} dangling references, first in {dangling[0][0]}")
