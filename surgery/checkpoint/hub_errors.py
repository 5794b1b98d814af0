"""Errors of `huggingface_hub`, explained to the user."""

from __future__ import annotations

__all__ = ["explain", "has_timed_out"]


def explain(error: Exception, repo_id: str, *, revision: str | None, local_files_only: bool = False) -> str:
    """Message for the user: what happened and what to do."""
    if has_timed_out(error):
        return _explain_silence(repo_id)
    return _explain_answer(error, repo_id, revision=revision, local_files_only=local_files_only)


def _explain_answer(error: Exception, repo_id: str, *, revision: str | None, local_files_only: bool) -> str:
    from huggingface_hub import constants, errors

    repo, where = repo_id, constants.ENDPOINT
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is neither an existing path nor a valid hub id: {error}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"Access to the hub repository {repo!r} is restricted. Accept its conditions at {where}/{repo}, "
            "then log in with `hf auth login`, or give a token that may read it (HF_TOKEN, or token=)."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The hub repository {repo!r} has no revision {revision!r}. Give a branch, a tag or a commit."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is no folder {repo!r} here and no such repository at {where}. Check the spelling; if the "
            "repository is private, log in with `hf auth login` or give a token (HF_TOKEN, or token=)."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _explain_not_cached(error, repo_id, revision=revision, local_files_only=local_files_only)
    return (
        f"The download of {repo!r} from {where} failed: {type(error).__name__}: {error}. "
        "Start again: files that are complete are kept."
    )


def has_timed_out(error: BaseException | None) -> bool:
    """Whether `error` comes of a timeout of the HTTP library; httpx and httpx2 have no class in common."""
    if error is None:
        return False
    return any(kind.__name__ == "TimeoutException" for kind in type(error).__mro__) or has_timed_out(error.__cause__)


def _explain_silence(repo_id: str) -> str:
    from huggingface_hub import constants

    return (
        f"{constants.ENDPOINT} has not answered in time: {repo_id!r} was looked for there, and is not complete in the "
        f"cache at {constants.HF_HUB_CACHE}. Check the network and HF_ENDPOINT, or set HF_HUB_ETAG_TIMEOUT "
        f"({constants.HF_HUB_ETAG_TIMEOUT} s) and HF_HUB_DOWNLOAD_TIMEOUT ({constants.HF_HUB_DOWNLOAD_TIMEOUT} s) to "
        "what it may take."
    )


def _explain_not_cached(error: Exception, repo_id: str, *, revision: str | None, local_files_only: bool) -> str:
    from huggingface_hub import constants

    subject = f"{repo_id!r} (revision {revision or constants.DEFAULT_REVISION})"
    place = f"the cache at {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{subject} is not complete in {place}, and HF_HUB_OFFLINE forbids to download it. Unset "
            f"HF_HUB_OFFLINE, or run `hf download {repo_id}` where there is a network."
        )
    if local_files_only:
        return (
            f"{subject} is not complete in {place}. If ranks on several nodes share no cache, set LOCAL_RANK "
            "so that one rank of each node downloads; else open it once without local_files_only."
        )
    return (
        f"{subject} is not complete in {place}, and {constants.ENDPOINT} cannot be reached "
        f"({error.__cause__ or error}). Check the network and HF_ENDPOINT."
    )
