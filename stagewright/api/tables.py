"""The tables of the store. What a document says stays in the document; columns hold what is searched or raced for."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Double, ForeignKey, Index, Integer, MetaData, String, Table, Text

METADATA = MetaData()

# SQLite counts up only an INTEGER primary key; PostgreSQL gives the same column 64 bits.
_SEQUENCE = BigInteger().with_variant(Integer, "sqlite")

OUTCOMES = Table(
    "outcomes",
    METADATA,
    Column("digest", String(80), primary_key=True),
    Column("document", Text, nullable=False),
)

PLANS = Table(
    "plans",
    METADATA,
    Column("seq", _SEQUENCE, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("version", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("termination", String(16)),
    Column("cached", Boolean, nullable=False),
    Column("request", Text, nullable=False),
    Column("request_digest", String(80), nullable=False),
    Column("model", String(200), nullable=False),
    Column("cluster", String(200), nullable=False),
    Column("labels", Text, nullable=False),
    Column("outcome_digest", String(80), ForeignKey("outcomes.digest")),
    Column("failure", Text),
    Column("progress", Text),
    Column("cancel_mode", String(16)),
    Column("attempt", Integer, nullable=False),
    Column("boot_id", String(40)),
    Column("heartbeat_at", Double),
    Column("deadline_s", Double, nullable=False),
    Column("deadline_at", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Index("plans_by_state", "state", "seq"),
    Index("plans_by_request", "request_digest", "state"),
    sqlite_autoincrement=True,
)

LABELS = Table(
    "plan_labels",
    METADATA,
    Column("plan_seq", _SEQUENCE, ForeignKey("plans.seq", ondelete="CASCADE"), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("value", String(200), nullable=False),
    Index("plan_labels_by_value", "name", "value"),
)

KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("scopes", String(80), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
)
