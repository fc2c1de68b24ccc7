"""A process that answers as an engine's does, with made-up times.

python fake_engine.py LOG [WHAT ...]: writes every command to LOG. WHAT is "SIDE:COMMAND" (which
fails), "SIDE:die", "small" (a cache of 10 tokens) or "preempt" (one preemption per command).
"""

import os
import sys

from benchmarks.processes import serve

LOG, *WHAT = sys.argv[1:]


class FakeEngine:
    def __init__(self, spec):
        self.side = "stock" if spec["plan"] is None else "DELTA"
        self.step = 0.004 if spec["plan"] is None else 0.002
        self.log("start")
        if f"{self.side}:die" in WHAT:
            print("first words\nlast words\n", file=sys.stderr, flush=True)
            os._exit(7)

    def log(self, do):
        with open(LOG, "a") as log:
            print(self.side, do, file=log)
        if f"{self.side}:{do}" in WHAT:
            raise RuntimeError("broken\non purpose")

    def facts(self):
        return {
            "kv_tokens": 10 if "small" in WHAT else 10**6, "backends": [self.side],
            "variable": os.environ.get("DELTADECODE_FAKE"),
        }  # fmt: skip

    def do(self, command):
        self.log(command["do"])
        times = self.times(**command)
        # Stock waits for half of its steps, and DELTA for a quarter.
        return {**times, "preemptions": int("preempt" in WHAT), "waited": self.waited(times)}

    def waited(self, times):
        taken = times.get("seconds", 0.0)
        return (sum(taken) if isinstance(taken, list) else taken) * self.step / 0.008

    def times(self, do, steps=0, new_tokens=0, **_):
        if do == "steps":
            return {"seconds": [self.step] * steps, "from": 1, "to": steps}
        if do == "profile":
            return {"busy_us": self.step * 1e6, "graph_launches": 1}
        return {"seconds": self.step * new_tokens, "steps": [self.step] * new_tokens}


if __name__ == "__main__":
    sys.exit(serve(sys.stdin, sys.stdout, FakeEngine))
