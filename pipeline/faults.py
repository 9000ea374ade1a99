"""Which faults of a storage can pass, which cannot, and what they say on one line."""

from __future__ import annotations

import asyncio
import re
import sys
from urllib.parse import urlsplit

from pipeline.printable import printable
from pipeline.s3 import REFUSED_CREDENTIALS, ObjectChangedError, RangeIgnoredError, error_code

Errors = tuple[type[BaseException], ...]
PERMANENT: Errors = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    ObjectChangedError,
    RangeIgnoredError,
)
QUOTED_URL = re.compile(r"\w+://[^\s'\"]+")


class CredentialsError(PermissionError):
    """The store refuses the credentials themselves: no object can be had until they are renewed."""


def _loaded(module: str, *names: str) -> Errors:
    """Errors of a client of a storage; none where it is not loaded, as nobody can have raised one.
    Loading botocore and aiohttp takes a quarter of a second: half of a local command's start."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names if hasattr(found, name))


def transient() -> Errors:
    """What may pass."""
    return (
        OSError,
        TimeoutError,
        *_loaded("aiohttp", "ClientError"),
        *botocore_errors(),
        *_loaded("botocore.parsers", "ResponseParserError"),
    )


def botocore_errors() -> Errors:
    return _loaded("botocore.exceptions", "BotoCoreError")


def no_credentials() -> Errors:
    """There are none."""
    names = ("NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError")
    return _loaded("botocore.exceptions", *names)


def no_credentials_now() -> Errors:
    """They cannot be had at present."""
    names = ("CredentialRetrievalError", "TokenRetrievalError", "SSOError")
    return _loaded("botocore.exceptions", *names)


def redact(url: str) -> str:
    """The URL without user, password and query, fit for logs and records. Of a chain
    (`simplecache::https://…`) each link; what cannot be parsed keeps its scheme alone."""
    return "::".join(map(_redact_link, printable(url).split("::")))


def _redact_link(url: str) -> str:
    if "://" not in url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # `http://[x`
        return url.partition("://")[0] + "://…"
    host = parts.netloc.rpartition("@")[2]
    # Elsewhere `?` and `#` may stand in a name.
    named = parts.scheme not in ("http", "https") and "=" not in parts.query
    path = url.partition("://")[2][len(parts.netloc) :] if named else parts.path
    return f"{parts.scheme}://{host}{path}"


def true_fault(error: BaseException) -> BaseException:
    """fsspec's http says "not found" for whatever it met while it asked for a size."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, transient()):
        return cause
    return error


def refusal_of_credentials(fault: BaseException) -> str | None:
    """Why the credentials are refused, where it is they that are."""
    code = error_code(fault)
    if code in REFUSED_CREDENTIALS:
        return f"{code}: {words(fault)}"
    return words(fault) if isinstance(fault, no_credentials()) else None


def raise_if_permanent(fault: BaseException, url: str) -> None:
    """Raises what trying again cannot mend, in words without the secret parts of the URL."""
    is_answer = isinstance(fault, _loaded("aiohttp", "ClientResponseError"))
    status = fault.status if is_answer else None  # type: ignore[attr-defined]
    if isinstance(fault, FileNotFoundError) or status in (404, 410):
        raise FileNotFoundError(f"{redact(url)} is not there") from fault
    if status in (401, 403):
        raise PermissionError(f"status {status}") from fault
    if isinstance(fault, ObjectChangedError):
        raise ObjectChangedError(f"{redact(url)}: {fault}") from fault
    if isinstance(fault, PERMANENT):
        raise fault


def words(error: BaseException) -> str:
    """What an error says, on one line; the URLs that http's errors quote lose their signatures."""
    name, text = type(error).__name__, printable(" ".join(str(error).split()))
    if isinstance(error, asyncio.TimeoutError) and not text:
        return "not done within its deadline"
    if text in ("", "None"):  # s3fs' errors for answers without a body
        return name
    text = QUOTED_URL.sub(lambda quoted: redact(quoted[0]), text)
    return (
        text if type(error) in (OSError, PermissionError, CredentialsError) else f"{name}: {text}"
    )


def is_out_of_space(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (28, 122)  # ENOSPC, EDQUOT
