"""README and pages are true: snippets run, commands and files exist, results are the records'."""

import re
from pathlib import Path

import pytest

import quantjax as qj
from quantjax.lab import recipes
from quantjax.lab.report import headline, records

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
RESULTS = ROOT / "experiments" / "RESULTS.md"
RECORDS = ROOT / "experiments" / "results"
FOLDERS = ("docs", "experiments", "notebooks", "quantjax", "tests")
LONGEST = 250  # lines of the README
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)

each = pytest.mark.parametrize("page", [README, *DOCS, RESULTS], ids=lambda path: path.stem)


def blocks_of(page):
    return CODE.findall(page.read_text())


def run(blocks, name):
    namespace = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    return namespace


def anchors(page):
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda path: path.stem)
def test_snippets_run_in_order(page, tmp_path, monkeypatch, quick_programs):
    monkeypatch.chdir(tmp_path)  # some write files
    assert run(blocks_of(page), page.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "lsq", "pact", "dorefa", "rq"])
def test_the_loop_of_learned_grids_takes_any_input_quantizer(name, quick_programs):
    blocks = blocks_of(ROOT / "docs" / "training.md")
    learned = next(block for block in blocks if "def srq_step(" in block)
    other = learned.replace("qj.srq_input(bits=3)", f"qj.{name}_input(bits=3)")
    assert other != learned
    assert run([blocks[0], other], "training.md")["encoded"]


def test_the_two_commands_are_the_ones_of_ci():
    commands = re.findall(r"```bash\n(.*?)\n```", README.read_text(), re.DOTALL)
    assert commands == [
        'pip install -e ".[lab]" && quantjax compare',
        'pip install -e ".[test]" && pytest',
    ]
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_results_are_the_records():
    page = RESULTS.read_text()
    assert records.BEGIN in page
    assert records.updated(page, RECORDS) == page


def test_the_table_of_the_comparison_is_the_record():
    page = README.read_text()
    assert headline.BEGIN in page
    assert records.updated(page, RECORDS) == page


@each
def test_begins_with_a_heading_and_what_it_is_for(page):
    heading, empty, line, *_ = page.read_text().splitlines()
    assert re.match(r"# \S", heading)
    assert not empty
    assert line


@each
def test_links_lead_somewhere(page):
    """From where the page lies, to headings too."""
    for link in re.findall(r"\]\(([^)]+)\)", CODE.sub("", page.read_text())):
        if not link.startswith("https://"):
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not heading or heading in anchors(target), link


@each
def test_files_that_it_names_exist(page):
    """From the root of the repository."""
    text = CODE.sub("", page.read_text())
    names = re.findall(r"`([\w/.]+\.(?:py|ipynb|txt|md))`", text)
    names = [name for name in names if name != "my_methods.py"]  # the reader's
    names += re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/]*)`", text)
    for name in names:
        assert (ROOT / name).exists(), name


@each
def test_recipes_and_names_that_it_tells_exist(page):
    text = CODE.sub("", page.read_text())
    for name in re.findall(r"`((?:alq|compare|fq|psg|srq)_\w+)`", text):
        assert name in recipes.known_recipes(), name
    for name in re.findall(r"\bqj\.(\w+)", text):
        assert hasattr(qj, name), name


def test_every_page_is_linked_from_the_readme():
    links = re.findall(r"\]\(([^)]+)\)", README.read_text())
    assert {str(page.relative_to(ROOT)) for page in (*DOCS, RESULTS)} <= set(links)
