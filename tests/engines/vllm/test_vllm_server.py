"""The real server, started by ``deltadecode serve`` and used through the ``openai`` client."""

import asyncio
import re

import pytest
from vllm_server import complete, serving  # of this folder

from deltadecode import DeltaConfig
from deltadecode.engines.serving.counts import attended_tokens
from deltadecode.engines.serving.settings import resolve
from deltadecode.lab.tasks import is_correct, make_problem

SETTINGS = {"page_size": 8, "budget_pages": 20, "recent_pages": 4}
SHORT = make_problem(1, steps=8, distractors=12)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found


def test_it_says_what_it_runs(server):
    log = server.log.read_text()
    assert re.search(r"serve \S+ --attention-backend CUSTOM --additional-config ", log)
    assert "deltadecode: dense layers" in log
    assert re.search(r"20 pages of 8 tokens \(4 recent, \d+ sink\); a step at 1024 tokens", log)


def test_streaming(server):
    async def streamed():
        client = server.client()
        stream = await complete(client, SHORT, 250, stream=True)
        return [chunk.choices[0].text async for chunk in stream if chunk.choices]

    pieces = asyncio.run(streamed())
    assert len(pieces) > 20
    assert is_correct(SHORT, "".join(pieces))


def test_metrics_count_what_was_attended_to(server):
    server.wait_until_idle()
    before, _ = server.metrics()
    answer = asyncio.run(complete(server.client(), SHORT, 100))
    after, text = server.metrics()
    prompt, new = answer.usage.prompt_tokens, answer.usage.completion_tokens
    assert new == 100

    class Config:
        model_type, hidden_size, num_hidden_layers = "llama", 256, 24
        num_attention_heads, num_key_value_heads = 4, 1

    settings = resolve(SETTINGS, Config())
    counts = [attended_tokens(settings, n) for n in range(prompt + 1, prompt + new)]
    gained = {
        name: after[f"deltadecode_{name}_tokens_total"]
        - before.get(f"deltadecode_{name}_tokens_total", 0.0)
        for name in ("attended", "full")
    }
    assert gained["attended"] == sum(attended for attended, _ in counts)
    assert gained["full"] == sum(full for _, full in counts)
    assert gained["attended"] < gained["full"]
    base = DeltaConfig.for_model(Config())
    plan = re.search(r"^deltadecode_plan\{(.*)\} 1\.0$", text, re.MULTILINE)[1]
    assert f'delta_layers="{" ".join(map(str, base.delta_layers))}"' in plan
    assert 'budget_pages="20"' in plan


def test_32_requests_of_mixed_lengths_with_a_third_aborted(server):
    problems = [make_problem(seed, steps=5 + seed % 9, distractors=12) for seed in range(32)]
    most = [20 + 9 * (seed % 16) for seed in range(32)]

    async def one(client, place):
        stream = await complete(client, problems[place], most[place], stream=True)
        chunks = 0
        async for _ in stream:
            chunks += 1
            if place % 3 == 0 and chunks == 8:
                await stream.close()
                return "aborted"
        return chunks

    async def all_of_them():
        client = server.client()
        return await asyncio.gather(*(one(client, place) for place in range(32)))

    ends = asyncio.run(all_of_them())
    assert ends.count("aborted") == 11
    assert all(end == "aborted" or end > 8 for end in ends)
    server.wait_until_idle()
    answer = asyncio.run(complete(server.client(), SHORT, 250))
    assert is_correct(SHORT, answer.choices[0].text)
