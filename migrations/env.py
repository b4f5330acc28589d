"""Runs the migration scripts on a connection that the caller opened, inside the caller's transaction."""

from alembic import context
from sqlalchemy import Connection, text

from controller.store.schema import metadata

# Any number that no other program uses as an advisory lock on the same PostgreSQL database: "assay" on a telephone.
ADVISORY_LOCK = 27729


def run(connection: Connection) -> None:
    """Run the scripts that alembic's command asked for."""
    if connection.dialect.name == "postgresql":
        # Two controllers that start at once must not both create the tables.
        connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
    )
    context.run_migrations()


run(context.config.attributes["connection"])
