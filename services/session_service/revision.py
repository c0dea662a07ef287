"""Which migration the database's schema stands at."""

import sqlalchemy as sa

from shared.database import Conn

# Alembic's own table, in the schema of ours; not part of our metadata, so that no migration touches it.
_version = sa.Table("alembic_version", sa.MetaData(), sa.Column("version_num", sa.Text))

EXISTS = sa.select(sa.func.to_regclass(sa.bindparam("name", type_=sa.Text)).is_not(None))
GET = sa.select(_version.c.version_num)


async def get(conn: Conn, schema: str) -> str | None:
    """The revision, or None where no migration has run."""
    if not await conn.value(EXISTS, name=f"{schema}.alembic_version"):
        return None
    version: str | None = await conn.value(GET)
    return version
