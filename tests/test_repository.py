"""The promises the repository makes about itself: budgets, layout, style, imports."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUDGETS = {'config/__init__.py': 134, 'prepare.py': 707, 'model.py': 709, 'train.py': 574,
           'sample.py': 820, 'eval.py': 916, 'data/*.py': 104}
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
    """Lines of code, so that what is added is weighed against what could go."""
    assert sum(lines_of_code(p.read_text()) for p in ROOT.glob(path)) <= BUDGETS[path]


@pytest.mark.parametrize('path', BUDGETS)
def test_functions_fit_on_a_page(path):
    for p in ROOT.glob(path):
        for node in ast.walk(ast.parse(p.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f'{p.name}: {node.name}'


def test_objectives_are_asked_not_compared():
    """What a probability model can do is an attribute of it; its name is for tables and errors."""
    by_name = re.compile(r"objective'?\]? *(==|!=|in|not in) *[('\"]")
    lines = [line for path in ('prepare.py', 'train.py', 'sample.py', 'eval.py')
             for line in (ROOT / path).read_text().splitlines() if by_name.search(line)]
    assert len(lines) <= 6, lines


def sources():
    return [*ROOT.glob('*.py'), *(p for folder in ('config', 'data', 'tests')
                               for p in ROOT.glob(f'{folder}/*.py'))]


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
                assert (name, module) != ('train.py', 'eval'), 'train.py needs nothing of eval.py'


def test_two_lines_read_the_causal_flag():
    """One of attention and one of local mixing; the guard that refuses time_cond does not count."""
    source = (ROOT / 'model.py').read_text()
    assert len(re.findall(r'\bc\.causal\b', source)) == 2
