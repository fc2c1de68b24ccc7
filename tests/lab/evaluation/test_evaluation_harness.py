"""lm-evaluation-harness with the package's policies, on a task file of our own.

Marked ``lm_eval``: ``make lm-eval`` installs the harness and runs them.
"""

import json
from functools import partial

import pytest

from deltadecode.cli import main
from deltadecode.lab.tasks import make_problem

pytestmark = pytest.mark.lm_eval

TASK = r"""
task: local_chain
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<eos>"], max_gen_toks: 80, do_sample: false}
filter_list:
  - name: answer
    filter:
      - {function: regex, regex_pattern: "the answer is (\\w+ \\d)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
SCORED = """
task: local_likelihood
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    problems = [make_problem(seed, 3, 2) for seed in range(3)]
    lines = [json.dumps({"prompt": p.prompt, "answer": p.answer}) for p in problems]
    data.write_text("\n".join(lines) + "\n")
    for name, text in (("chain", TASK), ("scored", SCORED)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


@pytest.fixture
def run(outcome, tasks, tmp_path):
    command = ["eval", "embedded", "--lm-eval-include", str(tasks), "--out", str(tmp_path / "o"),
               "--device", "cpu", "--samples", "3"]  # fmt: skip
    return partial(outcome, lambda arguments: main([*command, *arguments]))


@pytest.mark.filterwarnings("ignore")
def test_the_harness_decodes_with_the_policy(run, tmp_path):
    code, out, _ = run("--lm-eval", "local_chain", "--policies", "full,delta,streaming",
                       "--budgets", "64", "--json")  # fmt: skip
    assert code == 0
    cells = json.loads(out.splitlines()[-1])["cells"]
    right = {c["policy"]: c["results"]["local_chain"]["exact_match,answer"] for c in cells}
    assert right["full"] == 1.0 and right["streaming"] < 1.0
    assert set(right) == {"full", "delta", "streaming"}
    assert [c["samples"]["local_chain"] for c in cells] == [3, 3, 3]
    assert (tmp_path / "o" / "lm-eval__delta__64.json").is_file()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("local_likelihood", "is scored by loglikelihood, without decoding"),
        ("no_such_task", "lm-evaluation-harness has no task 'no_such_task'"),
    ],
)
def test_what_the_harness_cannot_measure_is_one_line(run, task, message):
    code, _, err = run("--lm-eval", task, "--policies", "full")
    assert code == 2 and message in err
