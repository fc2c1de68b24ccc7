"""The command line: results on stdout, one-line errors on stderr, exit codes 0, 1, 2 and 130."""

import json
import os
import signal
import subprocess
import sys

import pytest
from cli_models import command

# Help, version, usage


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["--help"],
    ],
)
def test_help_goes_to_stdout(run, command):
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert "Usage: deltadecode" in out


@pytest.mark.parametrize(
    "command", ["demo", "generate", "serve", "info", "calibrate", "eval", "inspect"]
)
def test_every_command_has_help_and_json(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--json" in out


def test_version(run):
    import deltadecode

    assert run("--version") == (0, deltadecode.__version__ + "\n", "")


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom deltadecode.cli import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["bench"], "bench"),
        (["info", "--nonsense"], "--nonsense"),
        (["generate"], "model"),
        (["generate", "m", "p", "--max-new-tokens", "0"], "0"),
        (["generate", "m", "p", "--max-new-tokens", "many"], "many"),
        (["generate", "m", "p", "--dtype", "float8"], "float8"),
        (["demo", "--seed", "-1"], "-1"),
    ],
)
def test_wrong_usage_is_one_line_that_names_it(refused, arguments, named):
    assert named in refused(*arguments)


# As a process


def test_process_writes_nothing_but_the_result(model):
    done = subprocess.run(
        command("generate", model, "Facts bada", "--max-new-tokens", "3", "--json"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["tokens_generated"] == 3
    assert done.stderr == ""


def test_process_refuses_with_exit_code_2():
    done = subprocess.run(
        command("generate", "no/such/model", "hi"), capture_output=True, text=True, check=False
    )
    expected = "deltadecode: error: model path 'no/such/model' does not exist\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_interrupt_ends_with_130_and_one_line(model, tmp_path):
    os.mkfifo(tmp_path / "prompt")
    process = subprocess.Popen(
        command("generate", model, "--prompt-file", tmp_path / "prompt"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A background job, as CI may be, starts with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Returns once the command has opened the other end: from then on it waits for its prompt.
    writer = os.open(tmp_path / "prompt", os.O_WRONLY)
    try:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        os.close(writer)
    assert (process.returncode, out) == (130, b"")
    assert err == b"deltadecode: error: interrupted\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"]])
def test_a_result_that_stdout_does_not_take_is_one_line_and_exit_code_1(arguments, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(*arguments), stdout=full, stderr=subprocess.PIPE, env=environment, check=False
        )
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_leaves_is_no_traceback(unbuffered):
    process = subprocess.Popen(
        command("info", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_letters_that_the_terminal_does_not_have_lose_nothing(model):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = ["generate", model, "Facts bada", "--max-new-tokens", "2", "--json"]
    for tokens, line in ((2, command(*arguments)), (None, command("info", model))):
        done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
        assert tokens is None or json.loads(done.stdout)["tokens_generated"] == tokens
