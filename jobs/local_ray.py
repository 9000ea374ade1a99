"""A Ray cluster of one's own: what other users and other machines must not reach, they do not.

Whoever reaches Ray's ports and has its token runs code as the user who started it. Ray 2.60 makes
the token's file readable to everybody, listens on every interface, and opens its session's folder
to all users; none of that has an option.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray._private import ray_constants, utils

from model.errors import UserError

logger = logging.getLogger(__name__)

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
OTHERS = 0o077
SESSIONS = "/tmp/tessera-{uid}"  # noqa: S108 short, as the paths of the sockets below it must be
TOKEN_BYTES = 32  # as Ray's own, 64 hexadecimal digits


def warn_without_authentication() -> None:
    """Says once that Ray is told to ask nobody for a token. Any value but `token` means that."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        logger.warning(
            "RAY_AUTH_MODE=%s: Ray runs without authentication, and who reaches its ports can run "
            "code as you; unset it, or set it to token",
            mode,
        )


def keep_token_private(create: bool) -> None:
    """Makes the file of Ray's token, if `create`, before Ray does; closes it to other users.

    A token that the user gave in another way is left as it is.

    Raises:
        UserError: the file cannot be written.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token" or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    token = Path.home() / ".ray" / "auth_token"
    try:
        if create and not token.exists():
            _make_token(token)
        elif token.exists() and token.stat().st_mode & OTHERS:
            token.chmod(PRIVATE_FILE)
            logger.warning(
                "%s: other users could read Ray's token; its mode is 600 now. If one may have, "
                "remove it while no cluster runs: the next one gets another",
                token,
            )
    except OSError as error:
        raise UserError(f"{token}: Ray's token cannot be kept there: {error.strerror}") from error


def _make_token(token: Path) -> None:
    """Whole and private from the first moment; one that another process made meanwhile stays."""
    token.parent.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
    beside = token.with_name(f"{token.name}.tmp-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
        with os.fdopen(descriptor, "w") as sink:
            sink.write(secrets.token_hex(TOKEN_BYTES))
        try:
            token.hardlink_to(beside)
        except FileExistsError:
            return
    finally:
        beside.unlink(missing_ok=True)


def keep_session_private() -> None:
    """Puts the session's folder, which Ray opens to all users, into one that is this user's alone:
    it holds logs, sockets, and spilled objects. A `RAY_TMPDIR` that is set stays.

    Raises:
        UserError: the folder is somebody else's, or open to others.
    """
    if "RAY_TMPDIR" in os.environ:
        return
    folder = Path(SESSIONS.format(uid=os.getuid()))
    with suppress(FileExistsError):
        folder.mkdir(PRIVATE_FOLDER)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & OTHERS:
        raise UserError(
            f"{folder}: Ray's session would lie there, and it is not a folder of this user's "
            "alone; remove it, or set RAY_TMPDIR to one that is"
        )
    os.environ["RAY_TMPDIR"] = str(folder)


@contextmanager
def own_sigterm() -> Iterator[None]:
    """A Ray that is started or joined inside leaves this process its handler of SIGTERM.

    Its own would end the process in the middle of the start, with exit status 1 or 15.
    """
    take = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = take


@contextmanager
def on_loopback() -> Iterator[None]:
    """A cluster started inside listens on loopback alone.

    Ray has that for Windows and macOS, where a node's address is 127.0.0.1; elsewhere it looks up
    the machine's own, also where `_node_ip_address="127.0.0.1"` is asked for, and its processes
    then listen on all interfaces.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
