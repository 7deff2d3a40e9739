"""Runs the migrations on the connection that the caller gives; Alembic executes this file."""

from __future__ import annotations

from alembic import context

from stagewright.api.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
