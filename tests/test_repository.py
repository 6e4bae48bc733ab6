"""The promises the repository makes about itself: budgets, layout, style, imports."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUDGETS = {
    # 60 was planned for settings alone, without what may go wrong later: memory, encodings, Ctrl-C
    'config/__init__.py': 160,
    # 320 was planned without the stand-in for a blocked download and without resuming downloads
    # over several mirrors, 45 lines between them, and without rows, 190: five sources of them (two
    # files, .csv, .jsonl, documents, two known data sets) and how they are read back
    'prepare.py': 567,
    # 420 was planned for ar and mdm; then came d3pm, uniform with its soft inputs, and block
    'model.py': 629,
    # 320 was planned with torch.optim.Muon, whose bfloat16 is 80 times slower on most CPUs; then
    # came --bench and the trackers, rows, which of them, how they grow and are weighed, the
    # settings of more objectives, and what may be wrong with each, or with a log
    'train.py': 514,
    # 450 was planned for the decoders, which it is without its section 'to be seen': --watch, and
    # --save to four formats, 70 lines of which are the page of HTML. 80 came with the objectives
    # d3pm, uniform and block, 50 with the answers to prompts, 40 with their lengths, and 40 with
    # trying several of these
    'sample.py': 910,
    # 600 was planned for likelihood, generation, speed and curves; then came infill, recover,
    # lambada and order, judges of Hugging Face, copies from the training text, the page that
    # collects everything, translation, lengths, reversal, and curves that are means over seeds
    'eval.py': 1112}
SCRIPTS = ('prepare.py', 'model.py', 'train.py', 'sample.py', 'eval.py')


def lines_of_code(source):
    """Lines that hold a token which is neither comment nor docstring."""
    found = set()
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if documented and ast.get_docstring(node) is not None:
            found.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(found)


@pytest.mark.parametrize('path', BUDGETS)
def test_budgets(path):
    assert lines_of_code((ROOT / path).read_text()) <= BUDGETS[path]


def sources():
    return [*ROOT.glob('*.py'), *ROOT.glob('config/*.py'), *ROOT.glob('tests/*.py')]


def test_top_level_is_the_planned_house():
    assert {p.name for p in ROOT.glob('*.py')} == set(SCRIPTS)


@pytest.mark.parametrize('path', sources(), ids=lambda p: p.name)
def test_lines_and_statements(path):
    source = path.read_text()
    assert max(map(len, source.splitlines()), default=0) <= 100
    starts = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    assert len(starts) == len(set(starts)), 'one statement a line'
    assert not re.search(r'\b(TODO|FIXME)\b', source.replace(r'(TODO|FIXME)', ''))


def test_imports_run_one_way():
    order = ('config', 'prepare', 'model', 'sample', 'eval', 'train')
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in set(modules) & set(order):
                assert order.index(module) < order.index(name[:-3]), f'{name} imports {module}'


def test_two_lines_read_the_causal_flag():
    """One of attention and one of local mixing; the guard that refuses time_cond does not count."""
    source = (ROOT / 'model.py').read_text()
    assert len(re.findall(r'\bc\.causal\b', source)) == 2
