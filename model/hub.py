"""Files of a checkpoint on the Hugging Face hub, brought into its local cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.errors import CheckpointError


def fetch(repo: str, revision: str | None, names: Sequence[str]) -> Path:
    """The cache's folder for one commit of `repo`, with those of `names` that the repo has.

    The folder is called after the commit that `revision` (None: the default branch) stands for.
    Nothing but `names` is downloaded. Without a network what the cache holds is used. Raises
    CheckpointError, one line, for anything the hub or the network refuses.
    """
    # Imported here: a checkpoint in a folder does without.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: its client's
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(names)))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo}: gated on the hub; accept its terms there and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo}: the hub has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo}: neither a folder here nor a repository on the hub that you may read"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{repo}: neither a folder here nor a hub id (owner/name)") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo}{at}: no such folder here, not whole in the local hub cache, and the hub "
            f"does not deliver it ({_one_line(error.__cause__ or error)})"
        ) from error
    except (OSError, HTTPError, RevisionResolutionError) as error:
        raise CheckpointError(
            f"{repo}{at}: download from the hub failed: {_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
