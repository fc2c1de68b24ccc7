"""An engine of the soak that makes up its answers; its arguments name the mistakes it makes."""

import sys

from benchmarks.processes import serve_process

MISTAKES = set(sys.argv[1:])


class Fake:
    def __init__(self, spec):
        self.delta = spec["plan"] is not None
        self.memory = 100.0

    def facts(self):
        return {}

    def do(self, command):
        return getattr(self, command.pop("do"))(**command)

    def answer(self, prompt):
        return [sum(prompt) + at for at in range(self.tokens)]

    def prompts(self, prompts, tokens):
        assert self.delta
        self.texts, self.tokens = prompts, tokens
        return {}

    def reference(self, prompts, tokens):
        assert not self.delta
        self.tokens = tokens
        return {
            "answers": [
                {"tokens": self.answer(prompt), "margins": [0.1] * tokens} for prompt in prompts
            ]
        }

    def run(self, requests):
        if "grow" in MISTAKES:
            self.memory *= 1.02
        ended = [self.ended(number) for number in range(requests // 2)]
        aborted = requests - len(ended)
        if MISTAKES & {"token", "short", "lose"}:
            one = ended.pop()
            if "token" in MISTAKES:
                one["tokens"][-1] += 1
            if "short" in MISTAKES:
                one["tokens"].pop()
            if "lose" not in MISTAKES:
                ended.append(one)
            MISTAKES.clear()  # once is enough
        return {
            "started": requests, "aborted": aborted, "ended": ended, "rss_mib": self.memory,
        }  # fmt: skip

    def ended(self, number):
        place, asked = number % len(self.texts), 1 + number % self.tokens
        return {
            "prompt": place, "asked": asked, "tokens": self.answer(self.texts[place])[:asked]
        }  # fmt: skip

    def drain(self):
        return {
            "aborted": 0, "ended": [], "live": 0, "held": 0, "preemptions": 0,
            "rss_mib": self.memory, "free": 7 if "leak" in MISTAKES else 9, "free_at_start": 9,
        }  # fmt: skip


if __name__ == "__main__":
    serve_process(Fake)
