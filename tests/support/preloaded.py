"""What a forkserver should not preload: a module that connects when it is imported.

It has a transaction open ever after.
"""

from __future__ import annotations

import os

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

import inherited
from models import Item


def server_session() -> int:
    """Ask the server which session ours is."""
    name = "pg_backend_pid()"
    if engine.dialect.name in ("mysql", "mariadb"):
        name = "connection_id()"
    number: int = session.execute(text(f"SELECT {name}")).scalar_one()
    return number


engine = create_engine(os.environ[inherited.PRELOADED])
session = Session(engine)
session.add(Item(name="preloaded"))
session.flush()
number = server_session()
pid = os.getpid()
