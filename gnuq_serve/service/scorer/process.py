"""The scorer process: loads the model, then scores what arrives on its socket.

Run by ``ScorerChild``, never by hand. It listens on a Unix socket only, and ends when its standard input
closes, that is, when the server that started it is gone.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO, NoReturn

import msgspec
import setproctitle
import torch

from gnuq_serve.adapters import AdapterError, AdapterScorers
from gnuq_serve.errors import first_line
from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.service.scorer.desk import Desk
from gnuq_serve.service.scorer.folder import ScorerFolder
from gnuq_serve.service.scorer.freed_memory import give_back
from gnuq_serve.service.scorer.loading import load_scorer, memory_of
from gnuq_serve.service.scorer.messages import ScorerConfig, ScorerState
from gnuq_serve.service.scorer.queue import Entry
from gnuq_serve.service.scorer.title import TITLE
from gnuq_serve.uncertainty import Uncertainty
from gnuq_serve.weights.steady import ChangingWeightsError, SteadyPasses

logger = logging.getLogger(__name__)


def main() -> int:
    """Load, report, serve for ever; returns where the model can't be loaded."""
    setproctitle.setproctitle(TITLE)
    # Libraries print to standard output; only our reports may go to the server.
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    folder = Path(sys.argv[1])
    line = sys.stdin.buffer.readline()
    if not line:
        _end(folder)
    config = msgspec.json.decode(line, type=ScorerConfig)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    torch.set_num_threads(config.threads)
    try:
        scorer, source, not_shared = load_scorer(config)
        # Warm-up: the first user does not pay for lazy initialisation, and for measuring what a pass takes.
        scorer.score([Sample([0, 0], [0])], mode=config.mode)
        desk = Desk(config)
    except Exception as error:  # whatever it is, the server must hear of it
        _report(reports, ScorerState(status="failed", reason=first_line(error)))
        return 1
    _report(
        reports,
        ScorerState(
            status="ready",
            model=config.model,
            dtype=scorer.dtype,
            device=scorer.device,
            fingerprint=scorer.fingerprint,
            weights=source.name,
            not_shared=not_shared,
            memory=memory_of(scorer, source, config.max_batch_tokens),
        ),
    )
    adapters = AdapterScorers(
        scorer,
        keep=config.max_adapters,
        max_batch_tokens=config.max_batch_tokens,
        memory_budget=config.memory_budget,
    )
    _serve(adapters, SteadyPasses(source, adapters.weights_changed), desk)
    return 0


def _serve(scorers: AdapterScorers, passes: SteadyPasses, desk: Desk) -> None:
    """Score batch after batch."""
    while True:
        batch = desk.next_batch()
        adapter = batch[0].request.adapter  # the same for the whole batch
        try:
            results = passes.run(lambda: _score(scorers.of(adapter), batch))  # noqa: B023  (called at once)
        except AdapterError as error:
            results = [Uncertainty.skipped(f"adapter not loaded: {error}")] * len(batch)
        except ChangingWeightsError as error:
            results = [Uncertainty.failed(str(error))] * len(batch)
        desk.reply(batch, [result.to_dict() for result in results])
        if desk.idle:
            give_back()


def _score(scorer: Scorer, batch: list[Entry[bytes]]) -> list[Uncertainty]:
    samples = [Sample(entry.request.prompt_ids, entry.request.answer_ids) for entry in batch]
    if not samples:
        return []
    options = batch[0].request.options  # the same for the whole batch
    try:
        return scorer.score(samples, on_invalid="fail", **dataclasses.asdict(options))
    except Exception as error:  # out of memory, say
        logger.exception("a batch of %d answers could not be scored", len(samples))
        if len(samples) == 1:
            return [Uncertainty.failed(first_line(error))]
    return [result for entry in batch for result in _score(scorer, [entry])]  # one must not cost the others


def _report(reports: IO[bytes], state: ScorerState) -> None:
    reports.write(msgspec.json.encode(state) + b"\n")
    reports.flush()


def _end_with_parent(folder: Path) -> None:
    # Not by sys.stdin: its lock, held by a daemon thread, makes the interpreter abort at exit.
    while os.read(0, 1024):
        pass
    _end(folder)


def _end(folder: Path) -> NoReturn:
    """End at once, a pass in progress has nobody to answer to; clean up if nobody of the server is left to."""
    for _ in range(20):  # the kernel may not have given back the parent's lock yet
        if ScorerFolder(folder).remove():
            break
        time.sleep(0.02)
    os._exit(0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main())
