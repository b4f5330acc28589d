"""The lease row: which controller may write, under an epoch that only grows, on the database's clock."""

from dataclasses import dataclass

from sqlalchemy import insert, select, update

from controller.store.opening import Store, told
from controller.store.schema import leases
from controller.store.statements import database_now


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """The lease as it stood: `age_s` since the holder's last heartbeat; `heartbeat` in seconds since 1970."""

    epoch: int
    holder: str
    heartbeat: float
    age_s: float
    resigned: bool


def read_lease(store: Store, name: str) -> LeaseRow | None:
    """Read the lease; None if nobody ever held it."""
    columns = (leases.c.epoch, leases.c.holder, leases.c.heartbeat, leases.c.resigned)
    with told(store.url), store.reader.connect() as connection:
        row = connection.execute(select(*columns, database_now().label("now")).where(leases.c.name == name)).first()
    if row is None:
        return None
    return LeaseRow(row.epoch, row.holder, row.heartbeat, row.now - row.heartbeat, bool(row.resigned))


def take_lease(store: Store, name: str, holder: str, previous: LeaseRow | None) -> int | None:
    """Take the lease if it still stands as `previous` was read; give the new epoch, or None if somebody was faster."""
    epoch = 1 if previous is None else previous.epoch + 1
    values = {"epoch": epoch, "holder": holder, "resigned": False, "acquired": database_now()}
    values["heartbeat"] = database_now()
    with told(store.url), store.engine.begin() as connection:
        if previous is None:
            if connection.execute(select(leases.c.name).where(leases.c.name == name)).first() is not None:
                return None
            connection.execute(insert(leases).values(name=name, **values))
            return epoch
        unchanged = (leases.c.name == name, leases.c.epoch == previous.epoch)
        if connection.execute(update(leases).where(*unchanged).values(**values)).rowcount != 1:
            return None
    return epoch


def resign_lease(store: Store, name: str, epoch: int) -> None:
    """Let a successor start at once and know that nothing went wrong. The epoch stays: it never goes back."""
    with told(store.url), store.engine.begin() as connection:
        connection.execute(update(leases).where(leases.c.name == name, leases.c.epoch == epoch).values(resigned=True))
