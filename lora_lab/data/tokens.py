"""Tokens of texts: computed once, cached by content, and padded to the longest row of a batch."""

import hashlib
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_lab.data.content import content_hash, hub_commit
from lora_lab.data.sources import cache_folder

log = logging.getLogger(__name__)

IGNORED = -100
"""The target of a token that counts for nothing."""

Encoded = dict[str, list[list[int]]]
"""A list of numbers for each text, by name: `input_ids` and what else the tokenizer gives."""

TEXTS_A_CALL = 5000
"""Texts that the tokenizer gets at once; it works on them in threads."""

TOKENIZER_SETTINGS = (
    *("special_tokens_map", "chat_template", "model_input_names"),
    *("truncation_side", "split_special_tokens"),
)
"""What decides its results beside a tokenizer's vocabulary and rules."""


def load_tokenizer(path: str | None) -> Any:
    """The tokenizer of a folder or hub id, loaded once. Raises ValueError, with the argument."""
    if path is None:
        raise ValueError(
            "tokenizer: must be given, a folder or hub id (by default it is model.path, which this"
            " model does not have)"
        )
    try:
        tokenizer = _tokenizer(path, content_hash(path, kind="tokenizer"))
        description(tokenizer)  # before a first use, which changes its settings of truncation
        return tokenizer
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise ValueError(f"tokenizer={path}: {why}") from None


@lru_cache(maxsize=4)
def _tokenizer(path: str, content: str) -> Any:
    from transformers import AutoTokenizer

    if (folder := Path(path).expanduser()).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    else:
        commit = hub_commit(path, None, "model")
        tokenizer = AutoTokenizer.from_pretrained(path, revision=commit, trust_remote_code=False)
    _check_vocabulary(tokenizer)
    return tokenizer


def _check_vocabulary(tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer that transformers has made up of special tokens alone.

    It does so for a model's folder without a tokenizer's files. Some kinds have one token more, the
    space of SentencePiece.
    """
    ids = {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}
    if len(ids) <= 1:
        raise ValueError(
            "holds no tokenizer: there is no tokenizer.json, vocab.txt, tokenizer.model,"
            " spiece.model, or vocab.json with merges.txt, so that all texts would be the same"
            " tokens; save the model's own there by transformers' save_pretrained, or set"
            " data.tokenizer to a folder that has it"
        )


def pad_id(tokenizer: Any) -> int:
    """The token that fills short rows: the tokenizer's, or the end of text where it has none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def padding(tokenizer: Any, flat: dict[str, Tensor]) -> dict[str, int]:
    """What fills the short rows of a batch, for each of a model's inputs that `flat` has."""
    numbers = {"input_ids": pad_id(tokenizer), "token_type_ids": 0}
    return {name: number for name, number in numbers.items() if name in flat}


@lru_cache(maxsize=4)
def description(tokenizer: Any) -> Any:
    """All that decides a tokenizer's ids and what it writes of chats, to be hashed."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        content = backend.to_str()
    else:
        content = content_hash(tokenizer.name_or_path, kind="tokenizer")
    settings = [str(getattr(tokenizer, name, None)) for name in TOKENIZER_SETTINGS]
    return [type(tokenizer).__name__, content, settings]


def model_inputs(encoded: Any) -> Encoded:
    """What a model takes of a tokenizer's output, without the mask, which comes with padding."""
    return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}


def tokenize(
    what: str,
    texts: Sequence[Sequence[Any]],
    tokenizer: Any,
    settings: dict[str, Any],
    encode: Callable[..., Encoded],
) -> dict[str, Tensor]:
    """The tokens of columns of texts as flat tensors, from the cache or computed now.

    `encode` takes a part of each column, and gives lists of numbers for each row. `settings` are
    what else decides its result. `what` is for the log. Gives `offsets` (N + 1,), and each of
    `encode`'s names as one tensor of all rows' numbers: row i has those from offsets[i] to
    offsets[i + 1]. The tensors of a cached file are mapped into memory, not read.
    """
    digest = hashlib.sha256(json.dumps([len(texts), settings, description(tokenizer)]).encode())
    for column in texts:
        for text in column:
            content = text if isinstance(text, str) else json.dumps(text)
            digest.update(f"{len(content)}:{content}".encode(errors="surrogatepass"))
    flat = cached(f"tokens/{digest.hexdigest()}", lambda: _flat(_encoded(what, texts, encode)))
    if (max_length := settings.get("max_length")) is not None:
        full = int((flat["offsets"].diff() >= max_length).sum())
        _log_full_rows(what, max_length, full, len(flat["offsets"]) - 1)
    return flat


@lru_cache(maxsize=64)  # once in a process, though training and validation share a source's tokens
def _log_full_rows(what: str, max_length: int, full: int, rows: int) -> None:
    """Logs how many rows have `max_length` tokens: a row that is cut does not say that it was."""
    if full:
        log.info(
            "%.1f%% of the rows of %s fill data.max_length=%s; what is longer is cut",
            100 * full / rows,
            what,
            max_length,
        )


def cached(name: str, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors stored under `name` in the cache, or else those that `build` gives, stored.

    Of several processes that want them, one builds and the others wait. A file that is cut off or
    whose checksum is wrong is built again.
    """
    file = cache_folder() / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if (tensors := _load(file)) is None:
            tensors = build()
            part = file.with_suffix(".part")
            save_file(tensors, part, {"checksum": str(_checksum(tensors))})
            part.replace(file)
        return tensors


def _load(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a cached file; None where there is none that is right."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if (stored.metadata() or {}).get("checksum") == str(_checksum(tensors)):
                return tensors
    except (OSError, SafetensorError):
        pass
    log.warning("%s is damaged, and made again", file)
    return None


def _checksum(tensors: dict[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].numpy().data, checksum)
    return checksum


def _encoded(
    what: str, texts: Sequence[Sequence[Any]], encode: Callable[..., Encoded]
) -> Iterator[Encoded]:
    """The tokens of consecutive parts of the texts; the log says how far it is."""
    rows, shown = len(texts[0]), time.monotonic()
    for start in range(0, rows, TEXTS_A_CALL):
        yield encode(*(column[start : start + TEXTS_A_CALL] for column in texts))
        if time.monotonic() - shown > 5:
            shown, done = time.monotonic(), min(start + TEXTS_A_CALL, rows)
            log.info("tokenizing %s: %s of %s rows, once", what, f"{done:,}", f"{rows:,}")


def _flat(parts: Iterable[Encoded]) -> dict[str, Tensor]:
    """Lists of numbers as one tensor for each name, and the offsets of the rows in it."""
    flat: dict[str, list[Tensor]] = {}
    lengths: list[int] = []
    for part in parts:
        lengths += map(len, part["input_ids"])
        for name, rows in part.items():
            numbers = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32)
            flat.setdefault(name, []).append(numbers)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return {"offsets": offsets, **{name: torch.cat(parts) for name, parts in flat.items()}}


class TokenRows:
    """Rows of tokens, indexed by a batch's row numbers (a tensor or a slice), padded on the right.

    `flat` and `offsets` are as `tokenize` gives them, `padding` the number that fills each name's
    short rows. `targets` has a row for each row of tokens; None: they are `flat["targets"]`, a
    target for each token. `rows` are those that this set has (None: all), so that the parts of one
    source share its tokens. A batch is as wide as its longest row, in a multiple of `multiple`.
    """

    def __init__(
        self,
        flat: dict[str, Tensor],
        padding: dict[str, int],
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        multiple: int = 1,
    ):
        self.offsets = flat["offsets"]
        self.flat = {name: flat[name] for name in padding}
        self.padding, self.targets, self.multiple = padding, targets, multiple
        self.rows = torch.arange(len(self.offsets) - 1) if rows is None else rows
        self.has_mask = True
        """Whether the inputs say which tokens are no padding."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs (B, T) by name, mostly with their attention mask, and the targets."""
        rows = self.rows[index]
        start = self.offsets[rows]  # (B,)
        lengths = self.offsets[rows + 1] - start
        longest = int(lengths.max()) if len(rows) else 1
        column = torch.arange(-(-longest // self.multiple) * self.multiple)  # (T,)
        is_token = column < lengths[:, None]  # (B, T)
        # Rows of 2 and 3 tokens that start at 0 and 2: [[0, 1, ·], [2, 3, 4]]. What lies behind a
        # short row belongs to the next row, or to none: it is read at 0 and then padded over.
        place = torch.where(is_token, start[:, None] + column, 0)
        batch = {
            name: torch.where(is_token, flat[place].long(), self.padding[name])
            for name, flat in self.flat.items()
        }
        targets = batch.pop("targets") if self.targets is None else self.targets[rows]
        mask = {"attention_mask": is_token.long()} if self.has_mask else {}
        return {**batch, **mask}, targets
