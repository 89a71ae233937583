"""Downloads models from the Hugging Face hub, and explains failures."""

import errno
import socket
from pathlib import Path

from ..common import UserError, unwritable

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
LOCAL = "or give a model folder on this machine"


def looks_like_repository(name: str) -> bool:
    """Whether a name has the form ORG/NAME of a repository and is not a path."""
    return name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "/", "~", "data/"))


def repository(name: str) -> Path:
    """The folder of a repository; downloads it on first use.

    Raises:
        UserError: the download fails (the cause, and what to do).
    """
    from .mlxlm import utils

    try:
        if Path(name).exists():  # a folder of this name, which is not a model
            return Path(utils.snapshot_download(name, allow_patterns=utils.DEFAULT_ALLOW_PATTERNS))
        return Path(utils._download(name))
    except Exception as error:  # four libraries raise exceptions of their own
        raise UserError(why(name, error)) from error


def why(name: str, error: BaseException) -> str:
    """An exception of `snapshot_download` as one sentence."""
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
        return f"There is no folder {name}, and it is not a repository name; give a folder or ORG/NAME."
    if constants.is_offline_mode() or "OfflineModeIsEnabled" in kinds:
        return (
            f"There is no folder {name}, and HF_HUB_OFFLINE forbids downloads; unset HF_HUB_OFFLINE, {LOCAL}."
        )
    if "GatedRepoError" in kinds or status == 403:
        return (
            f"The repository {name} requires that you accept its terms; accept them on huggingface.co, then "
            "log in with `hf auth login`."
        )
    if "RepositoryNotFoundError" in kinds or status in (401, 404):
        return (
            f"There is no folder {name}, and the hub has no public repository of that name; check "
            "the name, or log in with `hf auth login`."
        )
    if any(isinstance(each, socket.gaierror) for each in chain) or "Name or service" in str(error):
        return (
            f"The repository {name} cannot be downloaded, because the hub's host name cannot be resolved; "
            f"check the network and its name server, {LOCAL}."
        )
    if status:
        return (
            f"The repository {name} cannot be downloaded, because the hub answers with error {status}; try "
            f"again later, {LOCAL}."
        )
    if kinds & {"RemoteProtocolError", "ReadError", "ReadTimeout", "ChunkedEncodingError", "IncompleteRead"}:
        return f"The download of {name} was interrupted; run the same command again to resume it."
    if kinds & {"ConnectError", "ConnectTimeout", "TimeoutException", "ConnectionError", "TransportError"}:
        return (
            f"The repository {name} cannot be downloaded, because the hub cannot be reached; check the "
            f"network, {LOCAL}."
        )
    reason = next((line for line in str(chain[-1]).splitlines() if line), type(chain[-1]).__name__)
    return f"The repository {name} cannot be downloaded ({reason.rstrip('. ')}); check the network, {LOCAL}."


def _status(error: BaseException) -> int | None:
    """The HTTP status of an exception's response, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)
