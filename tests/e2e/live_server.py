"""How the tests start a real server and wait for its scorer."""

import os
import sys
import time
from pathlib import Path

import httpx

from gnuq_serve.demo_model import NAME, OFFLINE
from gnuq_serve.managed_server import CPU_ENVIRONMENT, HOST

KEY = "test-key"
ENV = {**CPU_ENVIRONMENT, **OFFLINE}
OPTIONS = ["--served-model-name", NAME, "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
OPTIONS += ["--max-num-seqs", "8", "--api-key", KEY, "--host", HOST]
GNUQ_SERVE = str(Path(sys.executable).with_name("gnuq-serve"))

os.environ["NO_PROXY"] = os.environ["no_proxy"] = HOST


def wait_for_scorer(running, status="ready"):
    """Our health route stands behind the API key, so it is asked with one."""
    url, headers = f"{running.base_url}/v1/uncertainty/health", {"Authorization": f"Bearer {KEY}"}
    for _ in range(240):
        state = httpx.get(url, headers=headers).json()
        if state["status"] == status:
            return state
        time.sleep(0.25)
    raise AssertionError(f"the scorer is not {status}: {state}\n{running.log_tail()}")
