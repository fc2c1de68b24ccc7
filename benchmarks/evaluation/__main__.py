"""Command line of the benchmark of the evaluation."""

import benchmarks.command as cli


def evaluation(as_json: cli.Json = False, out: cli.Out = None, tag: cli.Tag = "speed") -> None:
    """Time the evaluation itself on the CPU: problems in a batch beside one problem at a time."""
    with cli.checking(out, tag):
        from benchmarks.evaluation.run import run
        from benchmarks.report import table

    with cli.progress() as show:
        result = run(cli.command_line("evaluation"), show)
    cli.deliver(result, out, tag, as_json, table)


if __name__ == "__main__":
    cli.launch(evaluation)
