"""Tells an error in one line, without the password.

Runs in both processes.
"""

from __future__ import annotations

import re

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

# Of a URL that is quoted in an error: from the user's name to the host.
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*:[^@\s]*(?=@)")

_SECRET_OPTIONS = ("password", "passwd", "sslpassword", "ssl_key_password")


def told_of(exc: BaseException | str, url: URL | None) -> str:
    """Give an error in one line, without the password.

    Args:
        exc: The error, or its text. Of an error of the database, what the driver says.
        url: Where the password is known from; None if there is no URL.
    """
    told = exc.orig if isinstance(exc, DBAPIError) else exc
    text = "; ".join(filter(None, map(str.strip, str(told).splitlines())))
    text = text or type(told).__name__
    if url is not None:
        options = url.normalized_query
        secrets = [url.password]
        for name in _SECRET_OPTIONS:
            secrets += options.get(name, ())
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
    return _CREDENTIALS.sub("***", text)


def place_of(url: URL) -> str:
    """Give a URL without its password and its options, which may hold one too."""
    return url.set(query={}).render_as_string(hide_password=True)
