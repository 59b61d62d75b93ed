"""The tables. Only store.py and the migrations import this."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_UUID = sa.String(36)
_HOST = sa.String(255)


class Base(DeclarativeBase):
    """Every table of ours. DOUBLE, because MariaDB's FLOAT has no room for the seconds of today."""

    type_annotation_map = {float: sa.Double, dict[str, Any]: sa.JSON, list[Any]: sa.JSON}


class PairRow(Base):
    __tablename__ = "pairs"

    id: Mapped[str] = mapped_column(_UUID, primary_key=True)
    instance_id: Mapped[str] = mapped_column(_UUID, unique=True)
    project_id: Mapped[str] = mapped_column(sa.String(255))
    backup_id: Mapped[str | None] = mapped_column(_UUID, index=True)
    primary_host: Mapped[str] = mapped_column(_HOST)
    backup_host: Mapped[str | None] = mapped_column(_HOST)
    generation: Mapped[int]
    state: Mapped[str] = mapped_column(sa.String(32))
    reason: Mapped[str] = mapped_column(sa.Text)
    active_host: Mapped[str] = mapped_column(_HOST)
    active_since: Mapped[int]
    step: Mapped[str] = mapped_column(sa.String(32))
    token: Mapped[str] = mapped_column(sa.String(64))
    timeline: Mapped[dict[str, Any]]
    progress: Mapped[float]
    attempts: Mapped[int]
    retry_at: Mapped[float]
    refused: Mapped[dict[str, Any] | None]
    moved_at: Mapped[float]
    created_at: Mapped[float]
    updated_at: Mapped[float]
    worker: Mapped[str | None] = mapped_column(sa.String(255))
    worker_until: Mapped[float]


class HostRow(Base):
    __tablename__ = "hosts"

    name: Mapped[str] = mapped_column("host", _HOST, primary_key=True)
    capable: Mapped[bool]
    reason: Mapped[str] = mapped_column(sa.Text)
    data_address: Mapped[str] = mapped_column(sa.String(255))
    reported_at: Mapped[float]
    engines: Mapped[list[Any]]
    incarnation: Mapped[str | None] = mapped_column(sa.String(64))
    since: Mapped[float | None]
    abilities: Mapped[dict[str, Any] | None]
    forced_down_by_us: Mapped[bool]
    forced_at: Mapped[float]
