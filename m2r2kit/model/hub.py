"""Models from the Hugging Face hub, and why one does not come."""

import errno
import socket
from pathlib import Path

from ..common import UserError, unwritable

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
BY_HAND = "or give the folder of a model that is on this machine"


def looks_like_repository(name: str) -> bool:
    """Whether a name has the form ORG/NAME of a repository, and not that of a path."""
    return name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "/", "~", "data/"))


def repository(name: str) -> Path:
    """The folder of a repository, downloaded if it is not on this machine yet.

    Raises:
        UserError: it does not come: the cause, and the way out.
    """
    from .mlxlm import utils

    try:
        if Path(name).exists():  # a folder of that name that is no model
            return Path(utils.snapshot_download(name, allow_patterns=utils.DEFAULT_ALLOW_PATTERNS))
        return Path(utils._download(name))
    except Exception as error:  # of four libraries, each with exceptions of its own
        raise UserError(why(name, error)) from error


def why(name: str, error: BaseException) -> str:
    """One sentence for an exception of `snapshot_download`."""
    from huggingface_hub import constants, errors

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
    status = next((s for each in chain if (s := _status(each))), None)
    for each in chain:
        if isinstance(each, OSError) and each.errno in DISK:
            return str(unwritable(f"The download of {name} into {constants.HF_HUB_CACHE}", each))
    if isinstance(error, errors.HFValidationError):
        return f"There is no folder {name}, and it is no name of a repository; give a folder or ORG/NAME."
    if constants.is_offline_mode() or "OfflineModeIsEnabled" in kinds:
        return (
            f"There is no folder {name}, and HF_HUB_OFFLINE forbids to download it; unset HF_HUB_OFFLINE, "
            f"{BY_HAND}."
        )
    if "GatedRepoError" in kinds or status == 403:
        return (
            f"The repository {name} is open only to those who accepted its terms; accept them on "
            "huggingface.co, then log in with `hf auth login`."
        )
    if "RepositoryNotFoundError" in kinds or status in (401, 404):
        return (
            f"There is no folder {name}, and the hub has no repository of that name, or a private one; check "
            "the name, or log in with `hf auth login`."
        )
    if any(isinstance(each, socket.gaierror) for each in chain) or "Name or service" in str(error):
        return (
            f"The repository {name} cannot be fetched, because the name of the hub cannot be looked up; "
            f"check the network and its name server, {BY_HAND}."
        )
    if status:
        return (
            f"The repository {name} cannot be fetched, because the hub answers with error {status}; try "
            f"again later, {BY_HAND}."
        )
    if kinds & {"RemoteProtocolError", "ReadError", "ReadTimeout", "ChunkedEncodingError", "IncompleteRead"}:
        return f"The download of {name} was cut off; the same command goes on from where it stopped."
    if kinds & {"ConnectError", "ConnectTimeout", "TimeoutException", "ConnectionError", "TransportError"}:
        return (
            f"The repository {name} cannot be fetched, because the hub cannot be reached; check the network, "
            f"{BY_HAND}."
        )
    reason = next((line for line in str(chain[-1]).splitlines() if line), type(chain[-1]).__name__)
    return f"The repository {name} cannot be fetched ({reason.rstrip('. ')}); check the network, {BY_HAND}."


def _status(error: BaseException) -> int | None:
    """The HTTP status in an exception."""
    return getattr(getattr(error, "response", None), "status_code", None)
