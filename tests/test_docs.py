"""The documents: their links lead somewhere, and the tests that they name are there."""

import re
from pathlib import Path

import pytest

from .registry import LOSSES

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
DEFINITION = re.compile(r"^\[([^\]]+)\]: (\S+)$", flags=re.MULTILINE)

each_document = pytest.mark.parametrize(
    "document", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS]
)


def text_of(document: Path) -> str:
    return re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)


@each_document
def test_links_lead_to_files(document):
    text = text_of(document)
    for target in [*LINK.findall(text), *(target for _, target in DEFINITION.findall(text))]:
        if not re.match(r"[a-z]+:|#", target):
            assert (document.parent / target.split("#")[0]).exists(), f"{document.name} links to {target}"


@each_document
def test_named_tests_are_there(document):
    text = text_of(document)
    definitions = dict(DEFINITION.findall(text))
    named = set(re.findall(r"\]\[(test_\w+)\]", text))
    assert named == {name for name in definitions if name.startswith("test_")}
    for name in named:
        source = (document.parent / definitions[name]).read_text()
        assert f"\ndef {name}(" in source, f"{document.name} names {name}, which is not in {definitions[name]}"


def test_the_table_has_a_column_for_each_loss():
    text = (ROOT / "docs" / "pytorch.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("| | ")]
    assert heads
    for head in heads:
        assert [name.strip("` ") for name in head.split("|")[2:-1]] == [loss.name for loss in LOSSES]
