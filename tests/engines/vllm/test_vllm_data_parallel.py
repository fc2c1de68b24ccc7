"""Two replicas behind one server, on the loopback interface."""

import asyncio
import re

from vllm_server import complete, serving  # of this folder

from deltadecode.lab.tasks import is_correct, make_problem

PROBLEMS = [make_problem(seed, steps=8, distractors=12) for seed in range(4)]


def test_two_replicas_answer_and_count_together(tmp_path):
    with serving(tmp_path, "--data-parallel-size", "2") as server:

        async def all_of_them():
            client = server.client()
            answers = (complete(client, problem, 250) for problem in PROBLEMS)
            return await asyncio.gather(*answers)

        answers = asyncio.run(all_of_them())
        found, text = server.metrics()
    for problem, answer in zip(PROBLEMS, answers, strict=True):
        assert is_correct(problem, answer.choices[0].text)
    done = re.findall(
        r'^vllm:request_success_total\{engine="(\d)",.*\} (\d+)\.0$', text, re.MULTILINE
    )
    for engine in ("0", "1"):
        assert sum(int(count) for number, count in done if number == engine) > 0
    assert 0 < found["deltadecode_attended_tokens_total"] < found["deltadecode_full_tokens_total"]
