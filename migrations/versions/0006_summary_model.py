"""who wrote a summary

Revision 0006.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("summary_model", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("sessions", "summary_model")
