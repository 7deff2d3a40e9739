"""Plans, their labels and outcomes, and keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None
branch_labels = None
depends_on = None

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the first tables."""
    op.create_table(
        "outcomes",
        sa.Column("digest", sa.String(80), primary_key=True),
        sa.Column("document", sa.Text, nullable=False),
    )
    op.create_table(
        "plans",
        sa.Column("seq", _SEQUENCE, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(40), nullable=False, unique=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("termination", sa.String(16)),
        sa.Column("cached", sa.Boolean, nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("request_digest", sa.String(80), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("cluster", sa.String(200), nullable=False),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("outcome_digest", sa.String(80), sa.ForeignKey("outcomes.digest")),
        sa.Column("failure", sa.Text),
        sa.Column("progress", sa.Text),
        sa.Column("cancel_mode", sa.String(16)),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("boot_id", sa.String(40)),
        sa.Column("heartbeat_at", sa.Double),
        sa.Column("deadline_s", sa.Double, nullable=False),
        sa.Column("deadline_at", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("finished_at", sa.Double),
        sqlite_autoincrement=True,
    )
    op.create_index("plans_by_state", "plans", ["state", "seq"])
    op.create_index("plans_by_request", "plans", ["request_digest", "state"])
    op.create_table(
        "plan_labels",
        sa.Column("plan_seq", _SEQUENCE, sa.ForeignKey("plans.seq", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("value", sa.String(200), nullable=False),
    )
    op.create_index("plan_labels_by_value", "plan_labels", ["name", "value"])
    op.create_table(
        "keys",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("scopes", sa.String(80), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("revoked_at", sa.Double),
    )


def downgrade() -> None:
    """Drop all tables."""
    for table in ("keys", "plan_labels", "plans", "outcomes"):
        op.drop_table(table)
