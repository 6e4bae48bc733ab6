"""Every command of the README runs, at toy size and in the order in which it stands there."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import run

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
TOY = {'train.py': ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=128', '--overwrite',
                    '--batch_size=4', '--max_iters=2', '--eval_interval=1', '--device=cpu'],
       'sample.py': ['--device=cpu'],
       'eval.py': ['--device=cpu', '--repeats=2', '--gen_tokens=32', '--target_se=0',
                   '--max_windows=2', '--grid_steps=(2,)', '--gen_length=4', '--max_rows=4',
                   '--answer_steps=(2,)', '--steps=4', '--split=val']}
WORDS = "O Romeo, ROMEO: wherefore art thou? To be or not to be: What's in a name! But soft\n"


def commands():
    """The lines of README's sh blocks that start a script, without their comments."""
    blocks = re.findall(r'```sh\n(.*?)```', README, re.S)
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
        done = run(script, *rest, *TOY[script], cwd=folder)
        assert done.returncode == 0, f'{" ".join(words)}: {done.stderr}'
    monkeypatch.chdir(folder)
    exec(re.search(r'```python\n(import .*?)```', README, re.S)[1], {})  # on a run of theirs
    assert capsys.readouterr().out.splitlines()[-1].startswith('counts: ')


def test_readme_names_both_set_up_commands():
    assert 'pip install -e . && python train.py config/shakespeare_mdm.py' in README
    assert "pip install -e '.[test]' && python -m pytest" in README


def test_files_that_the_readme_shows_are_there():
    for path in re.findall(r'\]\(([^)#:]+)\)|src="([^":]+)"', README):
        assert (ROOT / (path[0] or path[1])).exists(), path
