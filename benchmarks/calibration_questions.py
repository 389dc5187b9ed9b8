"""Question files for ``benchmarks/calibration.py`` from public sets, and the commands that answer them.

Wanted in the folder DATA, as JSON Lines: ``facts_easy``, ``arithmetic``, ``commonsense_easy``, ``triviaqa``
(question, answers), ``arc_easy`` (question, choices, label), ``truthfulqa`` (question, mc1_choices, mc1_label,
best_answer, best_incorrect_answer). A set that is not there is left out.

    python benchmarks/calibration_questions.py DATA OUT [--limit N]
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def open_question(row: Row) -> Row:
    return {name: row[name] for name in ("id", "question", "answers")}


def multiple_choice(row: Row) -> Row:
    return {name: row[name] for name in ("id", "question", "choices", "label")}


def truthfulqa_choice(row: Row) -> Row:
    # More choices than letters would be an error; the set's longest list has 13.
    return {
        "id": row["id"],
        "question": row["question"],
        "choices": row["mc1_choices"],
        "label": row["mc1_label"],
    }


def truthfulqa_binary(row: Row) -> Row | None:
    if not row["best_incorrect_answer"]:
        return None
    choices = [row["best_answer"], row["best_incorrect_answer"]]
    return {"id": row["id"], "question": row["question"], "choices": choices, "label": 0}


# name: file, how a row is read, matcher, longest answer
SETS: dict[str, tuple[str, Callable[[Row], Row | None], str, int]] = {
    "facts_easy": ("facts_easy", open_question, "contains", 32),
    "arithmetic": ("arithmetic", open_question, "number", 32),
    "commonsense_easy": ("commonsense_easy", open_question, "contains", 32),
    "arc_easy": ("arc_easy", multiple_choice, "choice", 8),
    "truthfulqa_choice": ("truthfulqa", truthfulqa_choice, "choice", 8),
    "truthfulqa_binary": ("truthfulqa", truthfulqa_binary, "choice", 8),
    "triviaqa": ("triviaqa", open_question, "contains", 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT")
    parser.add_argument("--limit", type=int, metavar="N", help="put this into the printed commands")
    arguments = parser.parse_args()
    if arguments.data is None or arguments.out is None:
        print("name the folder with the sets, and one for the question files: DATA OUT")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, (file, read, match, max_tokens) in SETS.items():
        source = arguments.data / f"{file}.jsonl"
        if not source.exists():
            print(f"# {name}: no {source}")
            continue
        rows = [question for row in rows_of(source) if (question := read(row)) is not None]
        target = arguments.out / f"{name}.jsonl"
        target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        limit = f" --limit {arguments.limit}" if arguments.limit else ""
        print(
            f"gnuq-serve calibrate --server URL --data {target} --match {match} --max-tokens {max_tokens}{limit} "
            f"--collect-only --rows {arguments.out / name}.rows.jsonl --out {arguments.out / name}.json"
        )


def rows_of(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


if __name__ == "__main__":
    main()
