"""README.md and data/RESULTS.md keep their word.

Every command in their sh blocks runs, at toy size and in its order (commands inside a sentence do
not), and the files, pictures and sections to which they link are there.
"""

import re
import shlex
from pathlib import Path

import pytest
from conftest import run
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
RESULTS = (ROOT / 'data' / 'RESULTS.md').read_text(encoding='utf-8')
CONFIGS = [path for path in ROOT.glob('config/*.py') if path.name != '__init__.py']
TOY = {'train.py': ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=128', '--overwrite',
                    '--batch_size=4', '--max_iters=2', '--eval_interval=1', '--device=cpu'],
       'sample.py': ['--device=cpu'],
       'eval.py': ['--device=cpu', '--repeats=2', '--gen_tokens=32', '--target_se=0',
                   '--max_windows=2', '--grid_steps=(2,)', '--gen_length=4', '--max_rows=4',
                   '--answer_steps=(2,)', '--steps=4', '--split=val']}
WORDS = "O Romeo, ROMEO: wherefore art thou? To be or not to be: What's in a name! But soft\n"


def commands():
    """The lines of both pages' sh blocks that start a script, without their comments."""
    blocks = re.findall(r'```sh\n(.*?)```', README + RESULTS, re.S)
    lines = [line.split('  #')[0].strip() for block in blocks for line in block.splitlines()]
    lines = [line.split('&& ')[-1] for line in lines]
    return [shlex.split(line) for line in lines if line.startswith('python ') and '.py' in line]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with small stand-ins for the data sets: no test waits for a download."""
    folder = tmp_path_factory.mktemp('readme')
    (folder / 'words.txt').write_text(WORDS * 40)
    (folder / 'pairs.csv').write_text('en,fr\n' + 'A man is sleeping.,Un homme dort.\n' * 30)
    for words in (['words.txt', '--name=shakespeare_char'], ['words.txt', '--name=wikitext2_bpe'],
                  ['pairs.csv', '--name=multi30k', '--fields=en,fr', '--max_prompt=20',
                   '--max_answer=20']):
        done = run('prepare.py', *words, '--tokenizer=char', cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_commands_run_in_their_order(folder, monkeypatch, capsys):
    for words in commands():
        script, rest = words[1], words[2:]
        if script == 'prepare.py':
            continue  # downloads: tests/test_prepare.py has them
        rest = [str(ROOT / word) if word.startswith('config/') else word for word in rest]
        with monkeypatch.context() as patch:
            if script == 'train.py':  # drawing loss.png takes longer than toy runs: see test_train
                patch.setattr(Figure, 'savefig', lambda figure, path, dpi: None)
            done = run(script, *rest, *TOY[script], cwd=folder)
        assert done.returncode == 0, f'{" ".join(words)}: {done.stderr}'
    monkeypatch.chdir(folder)
    exec(re.search(r'```python\n(import .*?)```', RESULTS, re.S)[1], {})  # on a run of theirs
    assert capsys.readouterr().out.splitlines()[-1].startswith('counts: ')


def test_readme_names_both_set_up_commands():
    assert 'pip install -e . && python train.py config/shakespeare_mdm.py' in README
    assert "pip install -e '.[test]' && python -m pytest" in README


def test_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 260


def links(text):
    """What a page shows and links to, outside its blocks of code: (path, heading) of each."""
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    found = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text)
    return [(one or other).partition('#')[::2] for one, other in found
            if not re.match(r'\w+:', one or other)]


def headings(text):
    """The names by which GitHub links to the headings of a page."""
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    titles = re.findall(r'^#+ (.*)', text, re.M)
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', ['README.md', 'data/README.md', 'data/RESULTS.md'])
def test_files_and_headings_that_a_page_links_to_are_there(page):
    page = ROOT / page
    found = links(page.read_text(encoding='utf-8'))
    assert found
    for path, heading in found:
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            assert heading in headings(target.read_text(encoding='utf-8')), f'{path}#{heading}'


def test_results_list_their_sections_in_order():
    listed = re.findall(r'^\* \[([^]]+)\]\(#', RESULTS.split('\n## ')[0], re.M)
    assert listed == re.findall(r'^## (.*)', RESULTS, re.M)


def test_every_picture_of_the_repository_is_shown():
    shown = {Path(path).name for path, _ in links(README) + links(RESULTS)}
    assert {path.name for ext in ('png', 'gif') for path in ROOT.glob(f'data/*.{ext}')} <= shown


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_header_of_a_config_has_its_command_and_outcome(path):
    header = re.match(r'(?:#.*\n)+', path.read_text(encoding='utf-8'))[0]
    assert f'python train.py config/{path.name}' in header
    assert 3 <= len(header.splitlines()) <= 6
    header = ' '.join(header.replace('\n#', ' ').split())
    if 'data/RESULTS.md' in header:
        section = re.search(r'\(data/RESULTS\.md, ([^)]+)\)', header)[1]
        assert f'\n## {section}' in RESULTS, section
    else:
        assert 'not measured' in header
