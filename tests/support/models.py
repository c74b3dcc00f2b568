"""The tables of the tests.

Imported by tests and by workers.
"""

from __future__ import annotations

from sqlalchemy import ForeignKeyConstraint, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Holds the metadata."""


class Item(Base):
    """What most jobs write: one row shows that one of them was committed."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    amount: Mapped[int] = mapped_column(default=0)


class Link(Base):
    """Points at an item; on PostgreSQL this is checked at COMMIT and not before."""

    __tablename__ = "link"
    __table_args__ = (
        ForeignKeyConstraint(
            ["item_id"], ["item.id"], deferrable=True, initially="DEFERRED"
        ).ddl_if(dialect="postgresql"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int]
