"""Open a checkpoint without its weights: from the hub only the headers of its files are fetched, by HTTP range."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from surgery.checkpoint.checkpoint import Checkpoint, read_config
from surgery.checkpoint.header import LENGTH_BYTES, Header, TensorEntry, header_length, parse_header
from surgery.checkpoint.hub import (
    ANY_WEIGHTS,
    NOT_WEIGHTS,
    PATIENCE_WITH_A_CACHE,
    can_be_hub_id,
    exists,
    explain,
    find_cached,
    has_timed_out,
    is_whole,
    no_weights,
)
from surgery.checkpoint.index import Index
from surgery.checkpoint.layout import INDEX_NAME, SINGLE_NAME, Layout
from surgery.checkpoint.packed import find_packed
from surgery.checkpoint.patience import patience, say_cache_is_taken
from surgery.checkpoint.refusals import require_usable
from surgery.errors import CheckpointError

__all__ = ["peek"]

#: Fetched of each file at first: the header of a shard of a large model has some 20 KiB.
FIRST_BYTES = 1 << 16

#: Connections at a time.
THREADS = 8


def peek(
    path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Checkpoint:
    """Open a checkpoint without its weights: those of a hub id are not downloaded, and cannot be read from the result.

    `config.json` and the index file go to the cache of `huggingface_hub`; of each weight file the header is fetched
    by an HTTP range, and of tied weights that are stored twice a few samples. Offline (`HF_HUB_OFFLINE`) the repository
    has to be in the cache; a host that does not answer is waited for as in `surgery.checkpoint.hub.resolve`. Not
    collective.
    Raises `CheckpointError` for whatever would make the checkpoint unusable.
    """
    name = os.fspath(path_or_hub_id)
    if isinstance(path_or_hub_id, os.PathLike) or not can_be_hub_id(name) or exists(Path(name)):
        return Checkpoint.open(path_or_hub_id, revision=revision, token=token)
    # Imported here: it takes its settings from the environment on import.
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Checkpoint.open(name, revision=revision, token=token)
    cached = find_cached(name, revision=revision)
    if cached is not None and is_whole(name, cached, revision=revision):
        return _open_cached(name, cached)
    with patience(name, at_first=None if cached is None else PATIENCE_WITH_A_CACHE) as asked:
        try:
            return _Repository.find(name, revision=revision, token=token).checkpoint()
        # Across its releases, the errors of the HTTP libraries below it have no root in common but Exception.
        except Exception as error:
            if cached is not None and asked.unanswered is not None:
                say_cache_is_taken(name, cached.name, asked)
                return _open_cached(name, cached)
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(_explain(error, name, revision)) from error


def _open_cached(repo_id: str, folder: Path) -> Checkpoint:
    found = Checkpoint.open(folder)
    return replace(found, source=repo_id, revision=folder.name)


def _explain(error: Exception, repo_id: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    known = (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError)
    if isinstance(error, known) or has_timed_out(error):
        return explain(error, repo_id, revision=revision)
    return (
        f"{repo_id!r} is no folder here, and {constants.ENDPOINT} cannot be reached to look there "
        f"({type(error).__name__}: {error}). Check the network and HF_ENDPOINT, or give a folder."
    )


@dataclass(frozen=True, kw_only=True)
class _Repository:
    """A hub repository at one commit. `files`: all of them, by name."""

    repo_id: str
    commit: str
    token: str | bool | None
    files: tuple[str, ...]

    @classmethod
    def find(cls, repo_id: str, *, revision: str | None, token: str | bool | None) -> _Repository:
        from huggingface_hub import HfApi, constants

        found = HfApi(token=token).model_info(repo_id, revision=revision or constants.DEFAULT_REVISION)
        names = tuple(sibling.rfilename for sibling in found.siblings or ())
        return cls(repo_id=repo_id, commit=str(found.sha), token=token, files=names)

    def checkpoint(self) -> Checkpoint:
        """The checkpoint; the files of its entries are not on this machine."""
        config = self._download("config.json")
        self._download("adapter_config.json")  # which a download has too, and by which the model is refused
        folder = config.parent if config is not None else Path(self.repo_id)
        layout = self._layout(folder)
        with ThreadPoolExecutor(THREADS) as pool:
            headers = dict(zip(layout.files, pool.map(self._header, layout.files), strict=True))
        index = Index.join(layout, headers)
        content = read_config(folder) if config is not None else None
        packed = find_packed(index, content, path=folder, read=self._fetch)
        require_usable(index, content, packed, path=folder)
        return Checkpoint(
            source=self.repo_id,
            path=folder,
            revision=self.commit,
            index=index,
            config=content,
            packed=packed,
            fetch=self._fetch,
        )

    def _download(self, name: str) -> Path | None:
        if name not in self.files:
            return None
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo_id, name, revision=self.commit, token=self.token))

    def _layout(self, folder: Path) -> Layout:
        """The layout that a download of the repository would have."""
        # That by which snapshot_download chooses.
        from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # not in __all__

        if SINGLE_NAME in self.files:
            return Layout(files=(folder / SINGLE_NAME,))
        index = self._download(INDEX_NAME)
        if index is not None:
            return Layout.of_index(index.parent)
        found = list(filter_repo_objects(self.files, allow_patterns=ANY_WEIGHTS, ignore_patterns=NOT_WEIGHTS))
        if len(found) == 1:
            return Layout(files=(folder / found[0],))
        if not found:
            raise no_weights(self.repo_id, commit=self.commit)
        raise CheckpointError(
            f"The hub repository {self.repo_id!r} holds {len(found)} safetensors files at commit {self.commit} and no "
            f"{INDEX_NAME} that says how they belong together. Choose another repository or revision."
        )

    # Not by HfApi.parse_safetensors_file_metadata (huggingface_hub 2.4): its result lacks the length of the header, so
    # the place of each tensor in the file, which `_fetch` needs. Of 20 damaged headers that we refuse (overlaps, holes,
    # sizes, repeated keys, ...) it takes 13, and leaves 3 to a bare TypeError, AttributeError or RecursionError. It
    # fetches 100,001 bytes of each file where we fetch 65,536, 285,841 for a header of 185,840 where we fetch 185,848,
    # and all of a file from a server without ranges, where we stop. HfFileSystem does that too, and then returns the
    # whole file as the range that it was asked for.
    def _header(self, file: Path) -> Header:
        start, size = self._range(file.name, 0, FIRST_BYTES)
        end = LENGTH_BYTES + header_length(start[:LENGTH_BYTES], file=file, file_size=size)
        if len(start) < end:
            start += self._range(file.name, len(start), end)[0]
        return parse_header(start[LENGTH_BYTES:end], file=file, file_size=size)

    def _fetch(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        """The elements `start` to `stop` of a tensor."""
        first, last = (entry.start + element * entry.dtype.itemsize for element in (start, stop))
        return torch.frombuffer(bytearray(self._range(entry.file.name, first, last)[0]), dtype=entry.dtype)

    def _range(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        """The bytes `start` to `stop` of a file, as far as it has them, and its size; no more is fetched."""
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

        url = hf_hub_url(self.repo_id, name, revision=self.commit)
        headers = {
            **build_hf_headers(token=self.token),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()  # the error is said in the body too
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start
            content = b""
            for piece in response.iter_bytes():
                content += piece
                if len(content) >= skip + stop - start:
                    break
            return content[skip : skip + stop - start], _file_size(response.headers)


def _file_size(headers: Mapping[str, str]) -> int:
    """Size of the whole file: behind the slash of `Content-Range` if a part was sent, else the length of the answer."""
    return int(headers.get("Content-Range", "").rpartition("/")[2] or headers["Content-Length"])
