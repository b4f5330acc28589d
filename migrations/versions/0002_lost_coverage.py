"""How many checks a segment's steps made, how many of them failed themselves, and what could not be judged."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Of the segments that are there already nothing is known; no agent of then told what it lost.
NAMES = ("checks", "failed_checks", "unjudged")


def upgrade() -> None:
    """Add the counts, and why."""
    with op.batch_alter_table("segments") as batch:
        for name in NAMES:
            batch.add_column(sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("lost_because", sa.Text()))


def downgrade() -> None:
    """Drop them."""
    with op.batch_alter_table("segments") as batch:
        for name in ("lost_because", *NAMES):
            batch.drop_column(name)
