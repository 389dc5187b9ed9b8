"""SmolLM2 made to think: its token for " is" is called "</think>".

"The capital of France is Paris." then reads, to a reasoning parser, as the thought "The capital of France" and
the answer " Paris.". The weights are the demo model's own.
"""

import json
import shutil
from pathlib import Path

WORD = "Ġis"  # " is", as the tokenizer writes it
UNUSED = "<reponame>"


def make_thinking_model(model: Path, folder: Path) -> Path:
    """A copy of the demo model with another tokenizer; the weights are linked."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        elif file.is_file():
            shutil.copy(file, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).exists():
            path.write_text(path.read_text().replace(UNUSED, "<think>"))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    number = vocabulary.pop(WORD)
    vocabulary["</think>"] = number
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
    tokenizer["model"]["merges"] = [
        list(merge) for merge in merges if WORD not in merge and "".join(merge) != WORD
    ]
    path.write_text(json.dumps(tokenizer))
    return folder
