"""Covariances on a language model, by AUROC on the answers of an evaluation; each answer kept as it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gnuq_serve.calibration.journal import Journal
from gnuq_serve.calibration.metrics import auroc, bootstrap_aurocs, interval
from gnuq_serve.calibration.progress import progress_bar, say
from gnuq_serve.evaluation.working_file import read_results
from gnuq_serve.validation.language_model import (
    SOURCES,
    TEXT_TOKENS,
    Covariances,
    Item,
    fisher_diagonal,
    own_texts,
    random_texts,
    uncertainties,
)

RESAMPLES = 2000


class AnswersFile(Journal):
    """``log p`` and norms of each answer, by set and key."""

    kind = "gnuq_validate_answers"
    another = "name another --out"

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Arguments and errors as of `Journal`."""
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        super().__init__(path, settings)

    def add(self, row: dict[str, Any]) -> None:
        """Keep one answer."""
        self._take_row(row)
        self._append(row)

    def _take_row(self, row: dict[str, Any]) -> None:
        self.rows[row["set"], row["key"]] = row


def read_items(folder: str | Path) -> dict[str, list[Item]]:
    """Labelled answers of an evaluation by set, from its ``work.jsonl`` and ``rows.jsonl``.

    Raises:
        ValueError: the folder holds no finished evaluation.
    """
    items: dict[str, list[Item]] = {}
    try:
        results = read_results(Path(folder, "work.jsonl"))
        rows = Path(folder, "rows.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, rows):
            answer = results.get((row["set"], row["key"]), {}).get("answer", {})
            if answer.get("answer_ids"):
                item = Item(row["key"], answer["prompt_ids"], answer["answer_ids"], bool(row["correct"]))
                items.setdefault(row["set"], []).append(item)
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"--evaluation {folder}: no finished evaluation there ({error}); make one with gnuq-serve evaluate"
        ) from error
    if not items:
        raise ValueError(f"--evaluation {folder}: holds no labelled answer")
    return items


def answers_report(model_path: str, evaluation: str, out: Path, *, limit: int, texts: int) -> dict[str, Any]:
    """Score up to ``limit`` answers of each set under each covariance; AUROCs with intervals by set.

    Raises:
        ValueError: no evaluation there, no model, or a file in ``out`` begun under other settings.
    """
    items = read_items(evaluation)
    scored = {name: some[:limit] for name, some in items.items()}
    others = [item for some in items.values() for item in some[limit:]] or [i for s in items.values() for i in s]
    settings = {"model": model_path, "evaluation": str(evaluation), "texts": texts, "limit": limit}
    with AnswersFile(out / "answers.jsonl", settings) as file:
        todo = [
            (name, item) for name, some in scored.items() for item in some if (name, item.key) not in file.rows
        ]
        if todo:
            _score(model_path, todo, others, file, texts=texts, total=sum(map(len, scored.values())))
        rows = {name: [file.rows[name, item.key] for item in some] for name, some in scored.items()}
    return {"settings": settings, "sets": {name: set_report(some) for name, some in rows.items()}}


def _score(
    path: str,
    todo: Sequence[tuple[str, Item]],
    others: Sequence[Item],
    file: AnswersFile,
    *,
    texts: int,
    total: int,
) -> None:
    from transformers import AutoTokenizer

    from gnuq_serve.gradnorm.oracle import count_padding_rows
    from gnuq_serve.weights import load_checkpoint

    model = load_checkpoint(path, dtype="float32", device="cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    count_padding_rows(model)
    model.requires_grad_(True)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    say("the model writes texts of its own")
    step = max(1, len(others) // texts)
    found = {
        "own": own_texts(model, start, texts),
        "questions": [[*i.prompt_ids, *i.answer_ids][-TEXT_TOKENS:] for i in others[::step][:texts]],
        "random": random_texts(len(tokenizer), texts),
    }
    fishers = {}
    for name in SOURCES:
        bar = progress_bar(f"Fisher information: {name}", 0, len(found[name]))
        fishers[name] = fisher_diagonal(model, _counted(found[name], bar))
    covariances = Covariances(fishers)
    bar = progress_bar("answers", total - len(todo), total)
    for name, item in todo:
        log_p, norms = covariances.log_norms(model, item)
        about = {"set": name, "key": item.key, "correct": item.correct, "tokens": len(item.answer_ids)}
        file.add({**about, "log_p": log_p, "log_norms": norms})
        bar()


def _counted(texts: Sequence[Sequence[int]], bar: Any) -> Any:
    for text in texts:
        yield text
        bar()


def set_report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """AUROC for "wrong" of each covariance and form, and its difference to isotropic on the same resamples."""
    right = np.array([row["correct"] for row in rows])
    names = list(rows[0]["log_norms"])
    values = {
        (name, form): np.array([_forms(row, name)[form] for row in rows])
        for name in names
        for form in _forms(rows[0], names[0])
    }
    columns = list(values)
    scores = [-values[column] for column in columns]  # `auroc` wants right answers above wrong ones
    resampled = bootstrap_aurocs(scores, right, np.arange(len(rows)), resamples=RESAMPLES, seed=0)
    report: dict[str, Any] = {"answers": len(rows), "right": int(right.sum()), "auroc": {}}
    for at, (name, form) in enumerate(columns):
        base = columns.index(("isotropic", form))
        value, reference = auroc(scores[at], right), auroc(scores[base], right)
        difference = None if value is None or reference is None else value - reference
        report["auroc"].setdefault(name, {})[form] = asdict(interval(value, resampled[:, at])) | {
            "minus_isotropic": asdict(interval(difference, resampled[:, at] - resampled[:, base]))
        }
    return report


def _forms(row: Mapping[str, Any], name: str) -> dict[str, float]:
    return uncertainties(row["log_p"], row["tokens"], row["log_norms"][name])
