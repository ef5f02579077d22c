"""What object stores complain about, in the words of obstore: as errors of a bucket, with the way out."""

from __future__ import annotations

import re

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from aiostage.errors import CheckpointError, StorageError

__all__ = ["translate", "worded"]

_ANSWER = re.compile(r"(?:<\?xml[^>]*>\s*)?<Error>.*<Code>(.*?)</Code>\s*<Message>(.*?)</Message>.*</Error>", re.DOTALL)
"""What S3 and Azure say beside a status."""

_CAUSE = re.compile(r'(?:message|error): "([^"]+)"')
"""Why there is no connection: told only where Rust shows its structures."""

_NO_BUCKET = re.compile(r"\b(?:NoSuchBucket|ContainerNotFound)\b")

_REMEDIES = (
    (_NO_BUCKET, "Make the bucket, or check its name and the endpoint."),
    (
        re.compile(r"/latest/(?:api/token|meta-data)"),
        "No credentials were found, neither in the environment (AWS_ACCESS_KEY_ID, ...) nor a role of this machine. "
        "Profiles in ~/.aws are not looked at: for these pass an S3Store with "
        "credential_provider=obstore.auth.boto3.Boto3CredentialProvider().",
    ),
    (
        re.compile(r"/metadata/identity|/computeMetadata/"),
        "No credentials were found, neither in the environment nor a role of this machine.",
    ),
    (
        re.compile(r"source: BadScheme"),
        'Use https://, or allow plain HTTP with client_options={"allow_http": True} or AWS_ALLOW_HTTP=true.',
    ),
    (
        re.compile(r"kind: Timeout"),
        "A request took longer than it may. Where the network is slow, allow more: "
        'client_options={"timeout": "5 minutes"}.',
    ),
)


def worded(error: BaseException) -> str:
    """Return what an error says as a sentence, without its inner life but with the cause."""
    said, _, inner = str(error).partition("\n\nDebug source:")
    text = " ".join(_ANSWER.sub(r"\1: \2", said).split()).rstrip(".")
    cause = _CAUSE.search(inner) if text.endswith("error sending request") else None
    return f"{text}: {cause[1]}." if cause is not None else f"{text}."


def translate(error: Exception, location: str, *, conditional: bool = True) -> Exception:
    """Return what an error that came from a store is for a bucket: itself, or what is to be raised from it.

    Args:
        error: Any.
        location: What it is about.
        conditional: Whether the request had a condition. Without one, 409 and 412 are the store's own trouble.
    """
    if isinstance(error, CheckpointError) or not isinstance(error, BaseError | OSError):
        return error
    if isinstance(error, FileNotFoundError) and not _NO_BUCKET.search(str(error)):
        return error
    if isinstance(error, AlreadyExistsError | PreconditionError) and conditional:
        return FileExistsError(f"{location}: {worded(error)}")
    remedy = next((remedy for sign, remedy in _REMEDIES if sign.search(str(error))), None)
    if remedy is None and isinstance(error, PermissionDeniedError | UnauthenticatedError):
        remedy = "Check the credentials, what they allow, and the endpoint."
    return StorageError(worded(error), path=location, remedy=remedy)
