"""words of search enter their index in bundles

Revision 0010.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER INDEX session_search_words_idx SET (fastupdate = on, gin_pending_list_limit = 512)")


def downgrade() -> None:
    op.execute("ALTER INDEX session_search_words_idx RESET (gin_pending_list_limit)")
    op.execute("ALTER INDEX session_search_words_idx SET (fastupdate = off)")
