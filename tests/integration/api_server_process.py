"""One of several API server processes: a service that does what it reads, and says what came of it.

Reads one JSON list a line: ``[number, command, ...]``; writes ``[number, result]`` lines, in the order of the
results.
"""

import asyncio
import json
import sys

from gnuq_serve.service.answer import Answer
from gnuq_serve.service.requests.request_plan import RequestOptions
from gnuq_serve.service.scorer.errors import ScorerUnavailableError
from gnuq_serve.service.served import ServedModel, Server
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings


async def main():
    model, settings = sys.argv[1], json.loads(sys.argv[2])
    busy = 0.0
    service = UncertaintyService(load_settings().model_copy(update=settings))
    service.start(ServedModel(model=model, dtype="float32"), Server(name="shared", engine_load=lambda: busy))
    loop = asyncio.get_running_loop()
    tasks = set()

    async def do(number, command, *arguments):
        nonlocal busy
        result = None
        if command == "score":
            prompt, answer, options = arguments
            result = await service.score([Answer(prompt, answer)], RequestOptions(**options))
        elif command == "score_within":
            try:
                await service._client.score([1], [2], *arguments)
            except ScorerUnavailableError as error:
                result = str(error)
        elif command == "result":
            result = await service.result(*arguments)
        elif command == "state":
            result = service.state.status
        elif command == "load":
            result = [service._client.load.waiting, service._client.load.yielding]
        elif command == "engine":
            (busy,) = arguments
        elif command == "stop":
            await service.stop()
        print(json.dumps([number, result]), flush=True)

    while line := await loop.run_in_executor(None, sys.stdin.readline):
        tasks.add(asyncio.create_task(do(*json.loads(line))))
    await asyncio.gather(*tasks)


asyncio.run(main())
