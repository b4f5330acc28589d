"""The tables: what happened, what was decided, and what the numbers were; one definition for SQLite and PostgreSQL."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

# Named by convention, so that a migration can name the constraint that it drops on either engine.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Exactly what the decisions were fed, in order. `recorded` is the `now` they were given; `time` is the event's own.
# JSON lies in Text throughout: the bytes that were decided on are the bytes that come back, on either engine.
events = Table(
    "events",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("time", Float, nullable=False),
    Column("recorded", Float, nullable=False),
    Column("type", Text, nullable=False),
    Column("node", Text, nullable=False),
    Column("job", Text, nullable=False),
    Column("body", Text, nullable=False),
    # Where it came from; null for events of the controller itself.
    Column("agent_epoch", BigInteger),
    Column("report_seq", BigInteger),
    UniqueConstraint("node", "agent_epoch", "report_seq"),
    Index(None, "job", "type"),
)

# One row for each action of each event, by position in the decision. `status`: pending, done, failed, unknown.
actions = Table(
    "actions",
    metadata,
    Column("event_seq", BigInteger, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("id", Text, nullable=False, index=True),
    Column("type", Text, nullable=False),
    Column("node", Text, nullable=False),
    Column("job", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("incident", Text, nullable=False, index=True),
    Column("reason", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("decided", Float, nullable=False),
    Column("status", Text, nullable=False, index=True),
    Column("detail", Text, nullable=False),
    Column("finished", Float),
    ForeignKeyConstraint(["event_seq"], ["events.seq"]),
)

incidents = Table(
    "incidents",
    metadata,
    Column("id", Text, primary_key=True),
    Column("job", Text, nullable=False, index=True),
    Column("kind", Text, nullable=False),
    Column("opened", Float, nullable=False),
    Column("closed", Float),
    Column("document", Text, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("name", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("linked", Boolean, nullable=False),
    Column("spare", Boolean, nullable=False),
    Column("changed", Float, nullable=False),
    Column("document", Text, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("status", Text, nullable=False),
    Column("world", Integer, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("submitted", Float, nullable=False),
    Column("ended", Float),
    Column("reason", Text, nullable=False),
    Column("spec", Text, nullable=False),
)

# Incarnations of a job's gang, and who held which rank. `resumed_*` is null until a rank reported what it found.
generations = Table(
    "generations",
    metadata,
    Column("job", Text, primary_key=True),
    Column("generation", BigInteger, primary_key=True),
    Column("started", Float, nullable=False),
    Column("reason", Text, nullable=False),
    Column("resumed_step", BigInteger),
    Column("resumed_source", Text),
)

placements = Table(
    "placements",
    metadata,
    Column("job", Text, primary_key=True),
    Column("generation", BigInteger, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("node", Text, nullable=False, index=True),
    Column("device", Text, nullable=False, index=True),
    Column("pid", Integer, nullable=False),
    ForeignKeyConstraint(["job", "generation"], ["generations.job", "generations.generation"]),
)

# The processes that a node last reported; replaced as a whole.
processes = Table(
    "processes",
    metadata,
    Column("node", Text, primary_key=True),
    Column("pid", Integer, primary_key=True),
    Column("role", Text, nullable=False),
    Column("job", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
)

# Step history, packed: one row for each report, the records compressed, with columns to query on.
# Invariant: first_step <= last_step; loss columns are null when no record of the row had a finite loss.
segments = Table(
    "segments",
    metadata,
    Column("node", Text, primary_key=True),
    Column("epoch", BigInteger, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("job", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("first_step", BigInteger, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    Column("count", Integer, nullable=False),
    Column("loss_min", Float),
    Column("loss_mean", Float),
    Column("loss_max", Float),
    Column("reading", Float),
    Column("payload", LargeBinary, nullable=False),
    Column("checks", BigInteger, nullable=False, server_default="0"),
    Column("failed_checks", BigInteger, nullable=False, server_default="0"),
    Column("unjudged", BigInteger, nullable=False, server_default="0"),
    Column("lost_because", Text),
    Index(None, "job", "generation", "rank", "last_step"),
)

# How far each life of each agent has been stored: reports up to `seq` are durable. `dropped`: what it had to drop.
marks = Table(
    "marks",
    metadata,
    Column("node", Text, primary_key=True),
    Column("epoch", BigInteger, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("dropped", BigInteger, nullable=False),
)

# Trust: captured -> durable -> verified; suspect and revoked follow late evidence. `parent_step` is the lineage.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job", Text, primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),
    Column("chain", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("parent_step", BigInteger),
    Column("stall_s", Float),
    Column("write_s", Float),
    Column("trust", Text, nullable=False),
    Column("trust_reason", Text, nullable=False),
    Column("changed", Float, nullable=False),
)

drills = Table(
    "drills",
    metadata,
    Column("job", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("node", Text, nullable=False),
    Column("params", Text, nullable=False),
    Column("requested", Float, nullable=False),
    Column("fired", Float),
    Column("detail", Text, nullable=False),
)

# What operators changed, who and why; the key makes a repeated call harmless.
changes = Table(
    "changes",
    metadata,
    Column("key", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("time", Float, nullable=False),
    Column("request", Text, nullable=False),
    Column("reply", Text, nullable=False),
)

# Who may write. `epoch` only grows; `heartbeat` and `acquired` are on the database's clock.
leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("holder", Text, nullable=False),
    Column("acquired", Float, nullable=False),
    Column("heartbeat", Float, nullable=False),
    Column("resigned", Boolean, nullable=False),
)

# The decisions' state after event `seq`, so that a restart need not read the whole history.
snapshots = Table(
    "snapshots",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("body", Text, nullable=False),
)
