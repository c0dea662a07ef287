"""turns by their id alone

Revision 0005.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

INDEX = "session_turns_by_turn_id_idx"


def upgrade() -> None:
    # Writers go on meanwhile. It waits for every transaction that runs, however long, and nobody queues behind it:
    # a limit would only throw away what was built.
    with op.get_context().autocommit_block():
        limits = {name: op.get_bind().scalar(sa.text(f"SHOW {name}")) for name in ("lock_timeout", "statement_timeout")}
        for name in limits:
            op.execute(f"SET {name} = 0")
        # A run that was broken off leaves an index that takes writes and answers nothing.
        op.drop_index(INDEX, "session_turns", if_exists=True, postgresql_concurrently=True)
        op.create_index(INDEX, "session_turns", ["user_id", "turn_id"], postgresql_concurrently=True)
        for name, limit in limits.items():
            op.execute(f"SET {name} = '{limit}'")


def downgrade() -> None:
    # Takes no time; in a transaction, so that it is done or not.
    op.drop_index(INDEX, table_name="session_turns")
