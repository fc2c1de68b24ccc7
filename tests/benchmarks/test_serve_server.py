"""What the load benchmark reads in a server's log: kernels that were compiled, and when."""

import json
import sys
import urllib.request

import pytest

from benchmarks.serve.options import make_options
from benchmarks.serve.server import Server, compiled

SAYS = "Triton kernel JIT compilation during inference: "
# Compiles one kernel at its start and one for each prompt, named by the prompt's length.
CODE = f"""
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

def compile(name, details=""):
    print(f"WARNING [jit_monitor.py:9] é {SAYS}{{name}}{{details}}. This causes a latency spike",
          flush=True)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        compile(f"_of_{{len(body['prompt'])}}", " (constexprs={{BLOCK=16}}; key='a b')")
        self.answer()

    def answer(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

print("GPU KV cache size: 1,024 tokens", flush=True)
compile("_at_start")
HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path):
    started = Server("DELTA", [sys.executable, "-c", CODE], tmp_path)
    started.wait(60)
    yield started
    started.stop()


def test_compilations_are_counted_after_the_warm_up_and_named(server):
    server.warm_up(3, 7, 1)
    assert server.facts() == {
        "kv_tokens": 1024, "model_runner": 1, "jit_compilations": 0, "jit_kernels": {},
        "jit_kernels_warm_up": {"_at_start": 1, "_of_7": 3},
    }  # fmt: skip
    for tokens in (7, 7, 9):
        body = json.dumps({"prompt": [10] * tokens}).encode()
        urllib.request.urlopen(server.url, body, timeout=60).close()
    found = server.facts()
    assert found["jit_compilations"] == 3
    assert found["jit_kernels"] == {"_of_7": 2, "_of_9": 1}
    assert found["jit_kernels_warm_up"] == {"_at_start": 1, "_of_7": 3}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (f"{SAYS}_fused. This causes a latency spike; consider extending warmup", "_fused"),
        (f"{SAYS}make.<locals>.kernel (key='a b'). This causes", "make.<locals>.kernel"),
        ("TileLang JIT compilation during inference: mhc. This causes", "mhc"),
    ],
)
def test_names_are_read_as_vllm_writes_them(line, name):
    assert compiled(f"INFO ready\n{line}\n{line}\n".encode()) == {name: 2}


def test_servers_name_a_kernel_each_time(tmp_path):
    options = make_options(shape="tiny", names=["chat"], raw=tmp_path, output_len=20)
    for side in ("stock", "DELTA"):
        assert "--jit-monitor-verbose" in options.server_command(side, tmp_path)
