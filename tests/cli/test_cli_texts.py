"""Texts and numbers from the command line: what cannot be used is refused before anything loads."""

import json
import os
import subprocess

import pytest
from cli_models import command

BAD = "Facts \udcff"  # how a byte that is not UTF-8 arrives from the system
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "MODEL", BAD],
        ["generate", "MODEL", "Facts", "--system", BAD],
        ["inspect", "MODEL", "--prompt", BAD],
    ],
)
def test_text_that_is_not_utf8_is_refused_first(refused, model, nothing_loads, arguments):
    error = refused(*(str(model) if part == "MODEL" else part for part in arguments))
    assert r"is not UTF-8 text: got '\udcff' at character 6" in error


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize(
    "arguments", [["generate", "MODEL"], ["inspect", "MODEL", "--prompt", "-"]]
)
def test_stdin_that_is_not_utf8_is_refused_first(model, arguments, locale):
    done = subprocess.run(
        command(*(str(model) if part == "MODEL" else part for part in arguments)),
        input=b"Facts \xff",
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"deltadecode: error: prompt '-' is not UTF-8 text: ")
    assert done.stderr.count(b"\n") == 1


def test_a_byte_order_mark_is_no_part_of_a_prompt(run, model, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(MARK + b"Facts bada")
    arguments = ["generate", model, "--prompt-file", file, "--max-new-tokens", "1", "--json"]
    assert json.loads(run(*arguments)[1])["prompt_tokens"] == 2


def test_data_with_a_byte_order_mark_is_read(run, model, tmp_path):
    file = tmp_path / "data.jsonl"
    line = json.dumps({"prompt": "Facts bada leads to zale and adds 3 : 2 + 3 = 5"}).encode()
    file.write_bytes(MARK + line + b"\n" + line + b"\n")
    code, out, err = run(
        "calibrate", model, "--data", file, "--delta-layers", "2", "--rows", "4",
        "--page-size", "2", "--budget-pages", "4", "--recent-pages", "1", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["texts"]["fit"] == 1


@pytest.mark.parametrize("key", ["prompt", "completion"])
def test_data_with_half_of_a_letter_is_refused(refused, model, tmp_path, key):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "Facts", key: "bada \ud83d"}) + "\n")
    error = refused("calibrate", model, "--data", file, "--delta-layers", "2")
    assert "line 1 of the data" in error and r"'\ud83d'" in error


@pytest.mark.parametrize("seed", ["4294967296", "-1"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "MODEL", "Facts"],
        ["inspect", "MODEL", "--task", "chain"],
        ["eval", "MODEL"],
        ["demo"],
    ],
)
def test_a_seed_out_of_range_is_refused_first(refused, model, nothing_loads, arguments, seed):
    given = (str(model) if part == "MODEL" else part for part in arguments)
    assert seed in refused(*given, "--seed", seed)


def test_the_largest_seed_is_taken(run, model):
    arguments = ["generate", model, "Facts", "--max-new-tokens", "1", "--temperature", "1"]
    assert run(*arguments, "--seed", 2**32 - 1)[0] == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "inf"),
        ("--temperature", "nan"),
        ("--top-p", "nan"),
        ("--page-size", "9" * 30),
        ("--budget-pages", "9" * 30),
        ("--max-new-tokens", "9" * 30),
    ],
)
def test_numbers_that_no_tensor_takes_are_refused_first(
    refused, model, nothing_loads, option, value
):
    error = refused("generate", model, "Facts", option, value)
    assert option in error and value in error


@pytest.mark.parametrize("name", ["x" * 5000, "org/" + "x" * 5000])
@pytest.mark.parametrize(
    "line", [["generate", "NAME", "Facts"], ["info", "NAME"], ["eval", "NAME"]]
)
def test_a_name_too_long_for_a_file_is_no_model(refused, nothing_loads, line, name):
    assert name in refused(*(name if part == "NAME" else part for part in line))
