"""The scorer process: loads the model, then scores what arrives on its socket.

Run by ``ScorerClient``, never by hand. It listens on a Unix socket only, and ends when its standard input
closes, that is, when the server that started it is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO

import msgspec
import setproctitle
import torch
import zmq

from gnuq_serve.errors import first_line
from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.service.messages import CancelRequest, ScorerConfig, ScoreReply, ScoreRequest, ScorerState
from gnuq_serve.service.score_queue import Entry, ScoreQueue
from gnuq_serve.uncertainty import Uncertainty
from gnuq_serve.weights.checkpoint import check_same_vocabulary

logger = logging.getLogger(__name__)


def main() -> int:
    """Load, report, serve for ever; returns where the model can't be loaded."""
    setproctitle.setproctitle("gnuq-serve: scorer")
    # Libraries print to standard output; only our reports may go to the server.
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=ScorerConfig)
    threading.Thread(target=_end_with_parent, args=(config.endpoint,), daemon=True).start()
    torch.set_num_threads(config.threads)
    try:
        scorer = _load(config)
        scorer.score([Sample([0], [0])])  # warm-up: the first user does not pay for lazy initialisation
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        socket.sndhwm = socket.rcvhwm = 0  # the deadline bounds the queue; beyond a mark replies would be dropped
        socket.bind(config.endpoint)
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
        ),
    )
    _serve(scorer, socket, config.max_batch_tokens)
    return 0


def _load(config: ScorerConfig) -> Scorer:
    if config.model != config.served_model:
        check_same_vocabulary(config.model, config.served_model, trust_remote_code=config.trust_remote_code)
    return Scorer.from_pretrained(
        config.model,
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        config_overrides=config.config_overrides,
        max_batch_tokens=config.max_batch_tokens,
        memory_budget=config.memory_budget,
    )


def _serve(scorer: Scorer, socket: zmq.Socket[bytes], max_batch_tokens: int) -> None:
    """Score batch after batch; what came meanwhile is looked at between two of them."""
    queue: ScoreQueue[bytes] = ScoreQueue(max_batch_tokens)
    while True:
        _receive(socket, queue)
        batch = queue.next_batch(time.monotonic())
        for entry, result in zip(batch, _score(scorer, batch), strict=True):
            reply = ScoreReply(entry.request.id, result.to_dict())
            socket.send_multipart([entry.sender, msgspec.msgpack.encode(reply)])


def _receive(socket: zmq.Socket[bytes], queue: ScoreQueue[bytes]) -> None:
    """Take in all that has come; waits where there is nothing to do."""
    while True:
        try:
            sender, payload = socket.recv_multipart(zmq.DONTWAIT if queue else 0)
        except zmq.Again:
            return
        request = msgspec.msgpack.decode(payload, type=ScoreRequest | CancelRequest)
        if isinstance(request, CancelRequest):
            queue.cancel(sender, request.id)
        else:
            queue.add(sender, request)


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


def _end_with_parent(endpoint: str) -> None:
    # Not by sys.stdin: its lock, held by a daemon thread, makes the interpreter abort at exit.
    while os.read(0, 1024):
        pass
    folder = Path(endpoint.removeprefix("ipc://")).parent
    with contextlib.suppress(OSError):
        for path in folder.glob("scorer-*.sock"):
            path.unlink()
        folder.rmdir()
    os._exit(0)  # a pass in progress has nobody to answer to


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main())
