"""Find the folder or file that a path or a hub id means; a hub repository is downloaded once per node."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint.layout import INDEX_NAME, SINGLE_NAME, read_weight_map
from surgery.checkpoint.patience import patience, say_cache_is_taken
from surgery.checkpoint.rendezvous import Rendezvous, is_node_leader, rendezvous
from surgery.errors import CheckpointError

__all__ = [
    "ANY_WEIGHTS",
    "NOT_WEIGHTS",
    "PATIENCE_WITH_A_CACHE",
    "Resolved",
    "can_be_hub_id",
    "exists",
    "explain",
    "find_cached",
    "has_timed_out",
    "is_whole",
    "no_weights",
    "resolve",
]

# Files of a model and its tokenizer, apart from the weights. No pickle, and no code.
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
# Folders of a repository hold other things than the model: other formats, other frameworks, training states.
_IGNORED = ["*/*"]
# Without an index, every safetensors file may be the model, but the format of Mistral's own loader never is.
ANY_WEIGHTS = ["*.safetensors"]
NOT_WEIGHTS = [*_IGNORED, "consolidated*"]

#: Seconds for a first answer, where there is a snapshot that could be taken without one.
PATIENCE_WITH_A_CACHE = 3.0


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A local path; and, if it is a snapshot of a hub repository, the commit."""

    path: Path
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class _Request:
    repo_id: str
    revision: str | None
    token: str | bool | None
    local_files_only: bool


def resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Resolved:
    """Resolve `source` to a local path: an existing path, as it is; else the cached snapshot of a hub repository.

    Of a repository, the safetensors files and the small files of model and tokenizer are downloaded, unless
    they are in the cache: never a pickle, never code. A commit that is complete in the cache is taken from there and
    nobody is asked. Of a branch or a tag the hub is asked which commit it is; if the cache has one that is complete,
    and there is no answer within seconds, that one is taken, and said. Else a host that does not answer is waited for
    up to `HF_HUB_ETAG_TIMEOUT` seconds (10). `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and
    `HF_TOKEN` mean what they mean to `huggingface_hub`; `revision` is a branch, a tag or a commit, `token` a
    token, or False for none.

    Where `torch.distributed` is initialised and `source` can be a hub id, this is collective: the first rank
    of each node (`LOCAL_RANK`) downloads, the others wait and take the same commit from the cache; a failure
    on one rank is raised on all.

    Raises `CheckpointError` if there is no such thing, if it may not be read, or if it is not safetensors.
    """
    name = os.fspath(source)
    if not name:
        raise CheckpointError("Expected a path or a hub id, found an empty string.")
    if isinstance(source, os.PathLike) or not can_be_hub_id(name):
        return _local(Path(name), revision)
    with rendezvous() as ranks:
        # Asked of all ranks first: a folder that only some of them see must not leave the others waiting.
        found = ranks.gather(exists(Path(name)))
        if all(found):
            return _local(Path(name), revision)
        if any(found):
            missing = ", ".join(str(rank) for rank, there in enumerate(found) if not there)
            raise CheckpointError(
                f"{name!r} is a local path on some ranks and not on others (not on {missing}). "
                "Give its absolute path on all of them, or start all in the same folder."
            )
        request = _Request(repo_id=name, revision=revision, token=token, local_files_only=local_files_only)
        return _resolve_together(ranks, request)


def can_be_hub_id(name: str) -> bool:
    """Whether `name` has the form `name` or `owner/name`, which a relative path may have as well."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part and not part.startswith((".", "~")) for part in parts)


def exists(path: Path) -> bool:
    """Whether there is anything at `path`."""
    # `Path.exists` raises for a name that the file system cannot have, such as one of 300 characters.
    try:
        return path.exists()
    except OSError:
        return False


def _local(path: Path, revision: str | None) -> Resolved:
    if not exists(path):
        raise CheckpointError(
            f"There is no checkpoint at {path}. Expected an existing path, or a hub id such as owner/name.", path=path
        )
    if revision is not None:
        raise CheckpointError(
            f"Expected no revision for the local path {path}, found {revision!r}. Revisions are for hub ids.", path=path
        )
    # Absolute, so that a later change of the working directory does not move the checkpoint.
    return Resolved(path=path.absolute(), revision=None)


def _resolve_together(ranks: Rendezvous, request: _Request) -> Resolved:
    results = ranks.run((lambda: _snapshot(request).name) if is_node_leader() else None)
    commits = sorted({commit for commit in results if commit is not None})
    if len(commits) != 1:
        raise CheckpointError(
            f"Expected the first rank of every node to find the same commit of {request.repo_id!r}, found "
            f"{', '.join(commits) or 'no rank with LOCAL_RANK=0'}. If the repository has just changed, give "
            "a commit as revision; else check LOCAL_RANK, which torchrun sets."
        )
    # The commit, not the branch: what a branch means may differ between the hub and the cache.
    cached = replace(request, revision=commits[0], local_files_only=True)
    folder = ranks.run(lambda: _snapshot(cached))[ranks.rank]
    assert folder is not None
    return Resolved(path=folder, revision=folder.name)


def _snapshot(request: _Request) -> Path:
    """The folder of the snapshot in the cache, downloaded as far as it is missing. Its name is the commit."""
    if request.local_files_only:
        return _files(request)
    cached = find_cached(request.repo_id, revision=request.revision)
    if cached is not None and is_whole(request.repo_id, cached, revision=request.revision):
        return cached
    with patience(request.repo_id, at_first=None if cached is None else PATIENCE_WITH_A_CACHE) as asked:
        try:
            folder = _files(request)
        except CheckpointError:
            if cached is None or asked.unanswered is None:
                raise
            folder = cached
        if asked.unanswered is not None:
            say_cache_is_taken(request.repo_id, folder.name, asked)
    return folder


def find_cached(repo_id: str, *, revision: str | None) -> Path | None:
    """The snapshot in the cache if it has all weights, else None; no request is sent."""
    request = _Request(repo_id=repo_id, revision=revision, token=False, local_files_only=True)
    try:
        folder = _files(request)
        shards = read_weight_map(folder).values() if (folder / INDEX_NAME).is_file() else ()
    except CheckpointError:
        return None
    return folder if all((folder / shard).is_file() for shard in shards) else None


def is_whole(repo_id: str, cached: Path, *, revision: str | None) -> bool:
    """Whether `revision` is the commit of a cached snapshot that is known to have all its files.

    That is known where a list of the commit's files was kept, which `huggingface_hub` 2 has compared.
    """
    if revision != cached.name:
        return False
    try:
        from huggingface_hub import get_cached_repo_tree

        return bool(get_cached_repo_tree(repo_id, revision=revision))
    # No such function before release 2, and no root of its errors but Exception.
    except Exception:  # noqa: BLE001  # whatever it is, the hub is asked instead
        return False


def _files(request: _Request) -> Path:
    """The folder of the snapshot, with the files of model and tokenizer, downloaded unless `local_files_only`."""
    folder = _fetch(request, allow=_SMALL_FILES, ignore=_IGNORED)
    pinned = replace(request, revision=folder.name)
    if (folder / INDEX_NAME).is_file():
        # As `find_layout` and transformers have it, the single file comes before the index.
        if (_fetch(pinned, allow=(SINGLE_NAME,), ignore=()) / SINGLE_NAME).is_file():
            return folder
        # Only the shards that belong to the model: some repositories hold a second copy under other names.
        shards = sorted(set(read_weight_map(folder).values()))
        return _fetch(pinned, allow=[glob.escape(shard) for shard in shards], ignore=())
    _fetch(pinned, allow=ANY_WEIGHTS, ignore=NOT_WEIGHTS)
    if not any(folder.glob("*.safetensors")):
        raise no_weights(request.repo_id, commit=folder.name)
    return folder


def no_weights(repo_id: str, *, commit: str) -> CheckpointError:
    """The error for a repository that has no safetensors file for a model."""
    return CheckpointError(
        f"The hub repository {repo_id!r} has no safetensors weights at commit {commit}. Pickles are not downloaded, "
        "because loading one can run any code. Choose another repository or revision, or have it converted: "
        "https://huggingface.co/spaces/safetensors/convert."
    )


def _fetch(request: _Request, *, allow: Sequence[str], ignore: Sequence[str]) -> Path:
    # Imported here: a local path does not need it, and it takes its settings from the environment on import.
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            request.repo_id,
            revision=request.revision,
            token=request.token,
            local_files_only=request.local_files_only,
            allow_patterns=list(allow),
            ignore_patterns=list(ignore),
        )
    except CheckpointError:
        raise
    # Across its releases, the errors of the HTTP libraries below it have no root in common but Exception.
    except Exception as error:
        message = explain(error, request.repo_id, revision=request.revision, local_files_only=request.local_files_only)
        raise CheckpointError(message) from error
    return Path(folder)


def explain(error: Exception, repo_id: str, *, revision: str | None, local_files_only: bool = False) -> str:
    """Message for the user about an error of `huggingface_hub`: what happened and what to do."""
    from huggingface_hub import constants, errors

    repo, where = repo_id, constants.ENDPOINT
    if has_timed_out(error) or isinstance(error, errors.LocalEntryNotFoundError):
        return _explain_not_cached(error, repo_id, revision=revision, local_files_only=local_files_only)
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
    return (
        f"The download of {repo!r} from {where} failed: {type(error).__name__}: {error}. "
        "Start again: files that are complete are kept."
    )


def has_timed_out(error: BaseException | None) -> bool:
    """Whether `error` was caused by a timeout of the HTTP library; httpx and httpx2 have no class in common."""
    if error is None:
        return False
    return any(kind.__name__ == "TimeoutException" for kind in type(error).__mro__) or has_timed_out(error.__cause__)


def _explain_not_cached(error: Exception, repo_id: str, *, revision: str | None, local_files_only: bool) -> str:
    from huggingface_hub import constants

    if has_timed_out(error):
        return (
            f"{constants.ENDPOINT} has not answered in time: {repo_id!r} was looked for there, and is not complete in "
            f"the cache at {constants.HF_HUB_CACHE}. Check the network and HF_ENDPOINT, or set HF_HUB_ETAG_TIMEOUT "
            f"({constants.HF_HUB_ETAG_TIMEOUT} s) and HF_HUB_DOWNLOAD_TIMEOUT ({constants.HF_HUB_DOWNLOAD_TIMEOUT} s) "
            "to what it may take."
        )
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
