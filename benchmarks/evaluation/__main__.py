"""Command line of the benchmark of the evaluation."""

from functools import partial

from benchmarks.command import Json, Out, Tag, checking, command_line, deliver, launch, progress


def evaluation(as_json: Json = False, out: Out = None, tag: Tag = "speed") -> None:
    """Time the evaluation itself on the CPU: problems in a batch beside one problem at a time."""
    with checking(out, tag):
        from benchmarks.evaluation.run import run
        from benchmarks.report import table

    with progress() as show:
        result = run(command_line("evaluation"), show)
    deliver(result, out, tag, as_json, table)


main = partial(launch, evaluation)

if __name__ == "__main__":
    main()
