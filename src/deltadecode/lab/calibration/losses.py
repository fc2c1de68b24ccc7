"""What plans lose on texts: measured once, remembered, and kept in a file for the next run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltadecode.architecture import config_hash
from deltadecode.config import DeltaConfig
from deltadecode.errors import CalibrationError
from deltadecode.lab.calibration.space import Space
from deltadecode.lab.calibration.texts import Piece
from deltadecode.lab.policies.base import Floats
from deltadecode.lab.rows import RowsText

HEAD_ROWS = 32
_SAMPLED = 256  # values of each weight that the fingerprint of a model takes


class OutOfTime(Exception):
    """The time that was given is over."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A plan on the rows of one text, all [R] float64."""

    kl: Floats  # KL(full || plan), nats
    lost: Floats  # loss of the text's own next token, less that of full attention, nats
    same: Floats  # 1 where both would write the same token

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of some texts, one after the other."""
        names = ("kl", "lost", "same")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Losses:
    """The rows of every plan on every text.

    Texts are numbers of the pieces; those of :meth:`heads` stand for the first rows of others.
    Texts are prepared when they are first needed; that takes longest. ``until``, in seconds of
    :func:`time.monotonic`, is when :meth:`rows` begins to raise :class:`OutOfTime` for what is not
    measured yet, ``reserve`` seconds before it.
    """

    def __init__(
        self, model: Any, space: Space, pieces: Sequence[Piece], state: Path | None = None
    ) -> None:
        self.space, self.pieces = space, list(pieces)
        self.until = float("inf")
        self.reserve: Callable[[], float] = lambda: 0.0
        self.progress: Callable[[str], None] = lambda label: None
        self.prepare_seconds = self.pass_seconds = 0.0  # the longest text, the mean of passes
        self.passes = 0
        self._model, self._label = model, ""
        self._texts: dict[int, RowsText] = {}
        self._known: dict[tuple[DeltaConfig, int], Rows] = {}
        self._state = None if state is None else _State(state, fingerprint(model, pieces))
        if self._state is not None:
            self._known.update(self._state.read())

    def say(self, label: str) -> None:
        """Name what runs now; the progress tells it, then and after every pass."""
        self._label = label
        self.progress(label)

    def rows(self, cfg: DeltaConfig, text: int) -> Rows:
        """A plan on one text."""
        key = cfg, text
        if key not in self._known:
            if self.left() < 0:
                raise OutOfTime
            self._known[key] = rows = self._measured(cfg, text)
            if self._state is not None:
                self._state.add(cfg, text, rows)
        return self._known[key]

    def left(self) -> float:
        """Seconds until :class:`OutOfTime`."""
        return self.until - self.reserve() - time.monotonic()

    def heads(self, texts: Sequence[int]) -> list[int]:
        """Texts of the first :data:`HEAD_ROWS` rows of some, which take less time."""
        return [text + len(self.pieces) for text in texts]

    def kl(self, cfg: DeltaConfig, texts: Sequence[int]) -> float:
        """Mean KL over some texts."""
        return float(np.mean([self.rows(cfg, text).kl.mean() for text in texts]))

    def measured(self, texts: Sequence[int]) -> dict[DeltaConfig, float]:
        """Every plan that was measured on all of some texts, with its mean KL; the best first."""
        plans = dict.fromkeys(cfg for cfg, _ in self._known)
        found = {
            cfg: self.kl(cfg, texts)
            for cfg in plans
            if all((cfg, text) in self._known for text in texts)
        }
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def release(self) -> None:
        """Forget the caches of the texts, not what was measured."""
        self._texts.clear()

    def _measured(self, cfg: DeltaConfig, text: int) -> Rows:
        prepared = self._prepared(text)
        start = time.monotonic()
        log_probs = prepared.log_probs(self._model, self.space.policy(cfg))
        found = prepared.compare(log_probs)
        values = (found.kl, found.nll - found.nll_full, found.same)
        rows = Rows(*(value.double().cpu().numpy() for value in values))
        self.passes += 1
        self.pass_seconds += (time.monotonic() - start - self.pass_seconds) / self.passes
        self.progress(self._label)
        return rows

    def _prepared(self, text: int) -> RowsText:
        if text not in self._texts:
            if text >= len(self.pieces):
                self._texts[text] = self._prepared(text - len(self.pieces)).head(HEAD_ROWS)
            else:
                self.progress(f"preparing text {text + 1} of {len(self.pieces)}")
                start = time.monotonic()
                piece = self.pieces[text]
                ids = torch.tensor(piece.ids)
                self._texts[text] = RowsText.prepare(self._model, ids, piece.context)
                self.prepare_seconds = max(self.prepare_seconds, time.monotonic() - start)
        return self._texts[text]


class _State:
    """Measurements in a file, one JSON object a line, behind a line that says what of."""

    def __init__(self, path: Path, of: str) -> None:
        self.path, self._of = path, of

    def read(self) -> dict[tuple[DeltaConfig, int], Rows]:
        """What an earlier run measured; a line that it could not finish is left out."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
        except (OSError, UnicodeError) as error:
            raise CalibrationError(f"cannot read the state {str(self.path)!r}") from error
        head = _line(lines[0]) if lines else None
        if lines and (head is None or "of" not in head):
            raise CalibrationError(f"{str(self.path)!r} is no state of a calibration")
        if head is not None and head["of"] != self._of:
            raise CalibrationError(
                f"the state {str(self.path)!r} is of another model or of other texts; remove it to "
                "start anew"
            )
        found = {}
        whole = [line for line in lines if line.endswith("\n") and _line(line) is not None]
        for line in whole[1:]:
            one = _line(line)
            assert one is not None
            cfg = DeltaConfig.from_dict(one["plan"])
            values = (np.asarray(one[name], dtype=np.float64) for name in ("kl", "lost", "same"))
            found[cfg, int(one["text"])] = Rows(*values)
        # Anew, without the line that was cut: the next would go on in it.
        text = "".join(whole) or json.dumps({"of": self._of}) + "\n"
        try:
            self.path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CalibrationError(
                f"cannot write the state {str(self.path)!r}: {error.strerror}"
            ) from error
        return found

    def add(self, cfg: DeltaConfig, text: int, rows: Rows) -> None:
        """Write one measurement."""
        values = {
            "kl": [float(f"{value:.6g}") for value in rows.kl],
            "lost": [float(f"{value:.6g}") for value in rows.lost],
            "same": [int(value) for value in rows.same],
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"plan": cfg.to_dict(), "text": text, **values}) + "\n")


def _line(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def fingerprint(model: Any, pieces: Sequence[Piece]) -> str:
    """Hash of what a measurement hangs on besides the plan: shape, weights, precision and texts."""
    digest = hashlib.sha256(config_hash(model).encode())
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()[:_SAMPLED].float().cpu().numpy()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + some.tobytes())
    for piece in pieces:
        digest.update(f"{piece.context} {piece.ids}".encode())
    return digest.hexdigest()[:16]
