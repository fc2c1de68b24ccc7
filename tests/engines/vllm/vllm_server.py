"""The real server, started by ``deltadecode serve`` as a user would."""

import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
from conftest import environment  # of this folder

from deltadecode.lab.tasks import model_path

NAME = "chain"
# In seconds. On two cores that others use too, importing vLLM alone may take minutes.
START, FINISH = 900, 300


class Server:
    def __init__(self, port, log):
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def metrics(self):
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        found = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                bare = name.partition("{")[0]
                found[bare] = found.get(bare, 0.0) + float(value)
        return found, text

    def wait_until_idle(self):
        for _ in range(FINISH):
            found, _ = self.metrics()
            busy = ("vllm:num_requests_running", "vllm:num_requests_waiting")
            if not any(found[name] for name in (*busy, "vllm:kv_cache_usage_perc")):
                return
            time.sleep(1)
        raise AssertionError("blocks are still held")

    def client(self):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0)


@contextmanager
def serving(folder, *options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    command = [
        str(Path(sys.executable).with_name("deltadecode")), "serve", str(model_path()),
        "--page-size", "8", "--budget-pages", "20", "--recent-pages", "4",
        "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager",
        *options,
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT,
            env=environment(VLLM_LOGGING_LEVEL="INFO"),
        )  # fmt: skip
        try:
            for _ in range(START):
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(1)
            else:
                said = log.read_text()[-4000:]
                raise AssertionError(f"not ready after {START} seconds: {said}")
            yield Server(port, log)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


async def complete(client, problem, max_tokens, **more):
    answer = await client.completions.create(
        model=NAME, prompt=problem.prompt, max_tokens=max_tokens, temperature=0.0, **more
    )
    return answer
