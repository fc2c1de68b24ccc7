"""The documentation is true: its code runs, its commands exist, its links lead somewhere."""

import fnmatch
import json
import re
from functools import cache

import pytest
from docs_commands import WrongCommand, benchmark, check, check_span, extras, lines
from docs_pages import PAGES, ROOT, read

RESULTS = ROOT / "benchmarks" / "results"
page = cache(read)
SHELL = {"console", "sh", "bash", "shell"}
COMMAND = r"(deltadecode|make|python -m benchmarks\.\w+|\S*python training/\S+)( |$)"
OTHER_LANGUAGES = {"text", "json", "python"}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """Folder of a random model with a tokenizer; 28 layers, so that the plans of the pages fit."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    words = {word: number for number, word in enumerate(["<unk>", "How", "many", "primes", "?"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(path)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=28,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16384,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).save_pretrained(path)
    return str(path)


@pytest.fixture
def workplace(tmp_path, monkeypatch, small_model):
    """A folder with the files and models that commands and blocks of the pages name."""
    import deltadecode as dd

    monkeypatch.chdir(tmp_path)
    dd.DeltaConfig().save("plan.json")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How many?"}\n')
    (tmp_path / "long.txt").write_text("How many?")
    for text in (page(name).text for name in PAGES):
        for name in re.findall(r'(?:path = |from_pretrained\()"([\w./-]+)"', text):
            # A folder goes before a name of the hub.
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(small_model)
    return tmp_path


@pytest.fixture
def short_answers(monkeypatch):
    """No more than 24 tokens an answer, whatever a page asks for."""
    from transformers import GenerationMixin

    generate = GenerationMixin.generate

    def short(self, *inputs, **options):
        options["max_new_tokens"] = min(options.get("max_new_tokens", 24), 24)
        return generate(self, *inputs, **options)

    monkeypatch.setattr(GenerationMixin, "generate", short)


def with_python():
    return [
        name for name in PAGES if any(block.language == "python" for block in page(name).blocks)
    ]


@pytest.mark.parametrize("name", with_python())
def test_python_blocks_run_in_order(name, small_model, workplace, short_answers):
    """A page may leave ``path`` undefined, a model's folder; named models are that model too."""
    space = {"path": small_model}
    for block in page(name).blocks:
        if block.language == "python":
            # Padded, so that a traceback has the page's line numbers.
            code = compile("\n" * block.line + block.text, str(ROOT / name), "exec")
            if block.reason is None:
                exec(code, space)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_has_a_known_language(name):
    for block in page(name).blocks:
        assert block.language in SHELL | OTHER_LANGUAGES, f"{name}:{block.line}"
        if block.language == "json":
            json.loads(block.text)


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_shell_blocks_parse(name, workplace):
    for block in page(name).blocks:
        if block.language in SHELL and block.reason is None:
            for words in lines(block.text):
                check(words)


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])
def test_commands_within_the_text_exist(name):
    for span in page(name).spans:
        if "…" not in span and re.match(COMMAND, span):
            check_span(span)


def test_few_blocks_opt_out():
    opted = [
        (name, block.reason)
        for name in PAGES
        for block in page(name).blocks
        if block.reason is not None
    ]
    assert len(opted) <= 3, opted


def test_a_command_that_does_not_exist_is_seen(workplace):
    for line in (
        "deltadecode bench cpu",
        "deltadecode eval MODEL --polices full",
        "deltadecode generate",
        "make demos",
        "make pytest ARGS='tests/none.py'",
        "pip install '.[bench]'",
        "python training/none.py",
        "python training/train.py --epochs 3",
        "python -m benchmarks.none",
        "vllm serve MODEL",
        "curl example.org",
    ):
        (words,) = lines(line)
        with pytest.raises(WrongCommand):
            check(words)
    with pytest.raises(WrongCommand):
        check_span("deltadecode calibrate --recal")


@pytest.mark.parametrize("name", PAGES)
def test_links_and_anchors_lead_somewhere(name):
    for link in page(name).links:
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in page(target.relative_to(ROOT).as_posix()).anchors, link


@pytest.mark.parametrize("name", PAGES)
def test_result_files_and_figures_that_a_page_names_exist(name):
    dated = r"\b[a-z0-9]+(?:-[a-z0-9]+)*-20\d{6}[\w.-]*\.(?:json|png)\b"
    for file in re.findall(dated, page(name).text):
        assert (RESULTS / file).exists(), file


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])
def test_files_and_tests_that_a_page_names_exist(name):
    tests = {
        function
        for path in ROOT.glob("tests/**/*.py")
        for function in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    roots = [ROOT, ROOT / "src" / "deltadecode"]
    for span in page(name).spans:
        if re.fullmatch(r"test_\w+\*?", span):
            assert fnmatch.filter(tests, span), span
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", span):
            first = span.partition("/")[0]
            bases = [root for root in roots if (root / first).is_dir()]
            assert not bases or any((base / span).exists() for base in bases), span


def test_pages_that_the_code_names_exist():
    for folder in ("src", "benchmarks", "tests", "training"):
        for path in (ROOT / folder).glob("**/*.py"):
            text = path.read_text(encoding="utf-8")
            for file in re.findall(r"\bdocs/[\w-]+\.md", text):
                assert (ROOT / file).exists(), f"{path}: {file}"
            for wanted in re.findall(r"deltadecode\[([a-z,-]+)\]", text):
                assert set(wanted.split(",")) <= extras(), f"{path}: {wanted}"


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])
def test_extras_that_a_page_names_exist(name):
    named = re.findall(r"extras? `([a-z-]+)`|\[([a-z-]+)\]'", page(name).text)
    assert {one or other for one, other in named} <= extras()


def test_readme_is_short():
    assert len(page("README.md").text.splitlines()) <= 150


def test_readme_leads_to_every_page():
    linked = {link.partition("#")[0] for link in page("README.md").links}
    assert {name for name in PAGES if name.startswith(("docs/", "training/"))} <= linked


def test_every_command_has_a_line():
    from typer.main import get_command

    from deltadecode.cli.app import app

    spans = page("docs/commands.md").spans
    for command in get_command(app).commands:
        assert any(span.split()[:2] == ["deltadecode", command] for span in spans), command
    for path in (ROOT / "benchmarks").glob("*/__main__.py"):
        benchmark(path.parent.name)
        assert f"python -m benchmarks.{path.parent.name}" in spans
