"""One operation of a storage, tried again with growing, jittered pauses where that can help."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from model.errors import UserError
from pipeline import s3
from pipeline.faults import (
    PERMANENT,
    CredentialsError,
    is_out_of_space,
    no_credentials,
    no_credentials_now,
    raise_if_permanent,
    redact,
    refusal_of_credentials,
    transient,
    true_fault,
    words,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

# The limits of one operation, stated in docs/reliability-storage.md: so many attempts, each within
# the deadline (plus a second for each MiB that is written), and pauses of 0.5, 1, 2, 4 and 8 s,
# each up to half shorter or longer.
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.5
SLOWEST_BYTES_PER_SECOND = 1 << 20


def retried(
    fs: fsspec.AbstractFileSystem,
    deadline_seconds: float,
    function: Callable[..., T],
    *args: Any,
    what: str,
    url: str,
    waits: float = 0.0,
    unwanted: threading.Event | None = None,
    **kwargs: Any,
) -> T:
    """The result of `function(*args, **kwargs)`; an error says `cannot {what} {url}`.

    A request has `deadline_seconds`, and `waits` more where it is known to take long. Once
    `unwanted` is set it is not tried again.

    Raises:
        OSError: what cannot pass (not found, forbidden), did not pass in ATTEMPTS, or is unwanted.
    """
    if isinstance(fs, AsyncFileSystem):
        kwargs["timeout"] = deadline_seconds + waits
    renewed = False
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function(*args, **kwargs)
        except (*PERMANENT, *transient()) as error:
            fault = true_fault(error)
            refusal = refusal_of_credentials(fault)
            if refusal is not None and s3.is_s3(fs) and not renewed and attempt < ATTEMPTS:
                renewed = True  # they may have been, on this machine, since the last look
                logger.info("%s %s: access refused (%s); credentials are looked up again",
                               what, redact(url), refusal)  # fmt: skip
                _renew_credentials(fs)
                continue
            if refusal is not None:
                raise CredentialsError(
                    f"cannot {what} {redact(url)}: access refused ({refusal})"
                ) from error
            raise_if_permanent(fault, url)
            reason = words(fault)
            if attempt == ATTEMPTS or is_out_of_space(fault):
                kind = CredentialsError if isinstance(fault, no_credentials_now()) else OSError
                raise kind(f"cannot {what} {redact(url)}: {reason} ({attempt} attempts)") from error
            if unwanted is not None and unwanted.is_set():
                raise OSError(f"cannot {what} {redact(url)}: {reason} (given up)") from error
            pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)  # noqa: S311 jitter
            logger.warning(
                "%s %s: %s; attempt %d of %d, next in %.1f s",
                what, redact(url), reason, attempt, ATTEMPTS, pause,
            )  # fmt: skip
            if unwanted is None:
                time.sleep(pause)
            else:
                unwanted.wait(pause)
        except UserError:
            raise
        except Exception as error:  # a storage's own kind of error: told, never tried again
            raise OSError(f"cannot {what} {redact(url)}: {words(error)}") from error
    raise AssertionError("unreachable")


def _renew_credentials(fs: fsspec.AbstractFileSystem) -> None:
    """A new session, which looks for credentials in the environment, profile and instance again."""
    try:
        fs.connect(refresh=True)
    except (*no_credentials(), *no_credentials_now()) as error:
        raise CredentialsError(words(error)) from error
