"""The statements that session_service runs, taken from the service's own code while it runs, as pgbench scripts.

Its one invariant: a script runs the same SQL texts, in the same order and transactions, with parameters of the same
kinds; only what must differ from run to run (ids, seqs) is replaced by variables.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import asyncpg
from sqlalchemy.sql import ClauseElement

from shared.database import Compiled, Conn, Database, Row
from shared.json import dump_text

T = TypeVar("T")
_PLACE = re.compile(r"\$(\d+)")
_SEQS_BACK = 40
_IS_FIRST = "is_first"


@dataclass(slots=True)
class Seen:
    """A statement that was run: with which parameters, and what came of it. `compiled` is None for BEGIN and COMMIT."""

    sql: str
    compiled: Compiled | None = None
    values: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


class Recorder(Conn):
    """Runs statements on one connection and remembers them; stands where the service has its Database."""

    def __init__(self, connection: "asyncpg.Connection[Row]", schema: str) -> None:
        super().__init__(connection, {}, schema)
        self.seen: list[Seen] = []

    async def rows(self, statement: ClauseElement, **values: Any) -> list[Row]:
        compiled = self.sql(statement)
        found = await super().rows(statement, **values)
        self.seen.append(Seen(compiled.sql, compiled, values, found))
        return found

    async def write(self, work: Callable[[Conn], Awaitable[T]]) -> T:
        return await work(self)

    async def transact(self, work: Callable[[Conn], Awaitable[T]]) -> T:
        await self._note("BEGIN")
        done = await work(self)
        await self._note("COMMIT")
        return done

    async def _note(self, sql: str) -> None:
        await self._executor.fetch(sql)
        self.seen.append(Seen(sql))

    def as_database(self) -> Database:
        """For functions that take the service's Database; they use no more of it than there is here."""
        return self  # type: ignore[return-value]


@dataclass(slots=True)
class Script:
    """A pgbench script and the values (-D) of its parameters that stay the same."""

    lines: list[str] = field(default_factory=list)
    constants: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def script_of(
    seen: list[Seen], variables: dict[str, str], *, before: tuple[str, ...] = (), reads_once: bool = False
) -> Script:
    """The script of these statements. `variables` say what stands for a parameter, by its name.

    Once a statement has read the session, the seqs of later ones are reckoned from the last_seq that it gave, and the
    version and times that they ask for are the ones that it gave. With `reads_once` it is run in a client's first
    round only, and what the last statement gives stands for it in the next.
    """
    script = Script([*before])
    read: Row | None = None
    for number, each in enumerate(seen):
        if each.compiled is None:
            script.lines.append(f"{each.sql};")
            continue
        filled = []
        for place, name in enumerate(each.compiled.names):
            value = each.values.get(name, each.compiled.constants.get(name))
            filled.append(variables.get(name) or _argument(script, f"{number}_{place}", name, value, read))
        sql = _filled(each.sql, filled)
        if read is None and each.rows and "last_seq" in each.rows[0].keys():  # noqa: SIM118 - of a Record
            read = each.rows[0]
            once = [f"\\if :{_IS_FIRST}", f"{sql} \\gset", f"\\set {_IS_FIRST} 0", "\\endif"]
            script.lines += once if reads_once else [f"{sql} \\gset"]
        elif reads_once and each is seen[-1]:
            script.lines.append(f"{sql} \\gset")
        else:
            script.lines.append(f"{sql};")
    if reads_once:
        script.constants[_IS_FIRST] = "1"
    return script


def _argument(script: Script, number: str, name: str, value: Any, read: Row | None) -> str:
    """What stands for a parameter that has no variable of its own."""
    if value is None:
        return "NULL"
    if read is not None and name.endswith("_seq") and _is_near(value, read["last_seq"]):
        script.lines.append(f"\\set v{number} :last_seq + {value - read['last_seq']}")
        return f":v{number}"
    if read is not None and name in {"version", "created_at", "updated_at"}:
        return f":{name}"
    script.constants[f"p{number}"] = as_text(value)
    return f":p{number}"


def _filled(sql: str, arguments: list[str]) -> str:
    return _PLACE.sub(lambda found: arguments[int(found[1]) - 1], sql)


def _is_near(seq: int, last_seq: int) -> bool:
    return last_seq - _SEQS_BACK < seq <= last_seq + 2


def as_text(value: Any) -> str:
    """A parameter as Postgres reads it."""
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, list):
        return "{" + ",".join("NULL" if each is None else _quoted(as_text(each)) for each in value) + "}"
    if isinstance(value, dict):
        return dump_text(value)
    if isinstance(value, bytes):
        return f"\\x{value.hex()}"
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
