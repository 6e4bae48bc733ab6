"""config/__init__.py: what a word on the command line or a line in a config file does."""

import ast
import itertools
import os
import re
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
from hypothesis import assume, given, settings, strategies as st

import config
from config import UserError

REPOSITORY = Path(__file__).parents[1]
BLOCK = {'out_dir': 'out/somewhere', 'steps': 8, 'rate': 0.5, 'resume': False, 'start': '',
         'span': (0.0, 1.0)}
repeatable = partial(settings, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # override sets it for good


def apply(*words):
    """The settings that these words make of BLOCK."""
    return config.override(dict(BLOCK), list(words))


def write(name, text):
    Path(name).write_text(text, encoding='utf-8')
    return name


# Names and values


def test_nothing_given_changes_nothing():
    assert apply() == BLOCK


def test_only_lower_case_values_of_five_types_are_settings():
    """Constants, private names, modules and functions of a script can't be set from outside."""
    extra = {'CONSTANT': 1, '_private': 2, '__file__': 'x.py', 'ast': ast, 'apply': apply,
             'table': {}, 'nothing': None}
    assert config.override(BLOCK | extra, ['--steps=9']) == BLOCK | {'steps': 9}
    for name in extra:
        with pytest.raises(UserError, match='no setting'):
            config.override(BLOCK | extra, [f'--{name}=1'])


def test_the_globals_themselves_are_changed():
    values = dict(BLOCK)
    assert config.override(values, ['--steps=9', '--start=a']) == values
    assert (values['steps'], values['start']) == (9, 'a')


def test_words_come_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['script.py', '--steps=9', '--resume'])
    assert config.override(dict(BLOCK)) == BLOCK | {'steps': 9, 'resume': True}


def test_the_last_word_wins():
    write('a.py', 'steps = 1\nrate = 0.1')
    write('b.py', 'steps = 2')
    for words, steps in ((['a.py', 'b.py'], 2), (['b.py', 'a.py'], 1), (['a.py', '--steps=3'], 3),
                         (['--steps=3', 'a.py'], 1), (['--steps=3', '--steps=4'], 4)):
        assert apply(*words)['steps'] == steps
    assert apply('a.py', 'b.py')['rate'] == 0.1


def test_of_epochs_and_max_iters_the_later_counts():
    block, run = {'max_iters': 9, 'epochs': 0.0}, {'max_iters': 7, 'epochs': 1.5, 'gone': 3}
    write('a.py', 'max_iters = 3\nepochs = 3')
    for words, epochs in (([], 0), (['--epochs=2'], 2), (['--epochs=2', '--max_iters=5'], 0),
                          (['--max_iters=5', '--epochs=2'], 2), (['a.py'], 3),
                          (['a.py', '--max_iters=5'], 0), (['--max_iters=5', 'a.py'], 3)):
        assert config.override(dict(block), words)['epochs'] == epochs
    for words, epochs in (([], 1.5), (['--max_iters=8'], 0), (['--epochs=2'], 2)):
        found = config.override(dict(block), words, earlier=run)
        assert found == {'max_iters': 8 if epochs == 0 else 7, 'epochs': epochs}
    write('b.py', 'epochs = float("nan")')
    for word in ('--epochs=0', '--epochs=-1', '--epochs=0.0', 'b.py'):
        with pytest.raises(UserError, match='^epochs is .* must be above 0$'):
            config.override(dict(block), [word])


def test_an_int_does_for_a_float():
    write('a.py', 'rate = 3')
    for words in (['--rate=3'], ['a.py']):
        rate = apply(*words)['rate']
        assert rate == 3.0 and type(rate) is float


@pytest.mark.parametrize('word, value', [
    ('--resume', True), ('--resume=True', True), ('--resume=true', True), ('--resume=TRUE', True),
    ('--resume=False', False), ('--resume=false', False)])
def test_forms_of_a_bool(word, value):
    opposite = BLOCK | {'resume': not value}
    assert config.override(opposite, [word])['resume'] is value


def test_only_the_first_equals_sign_divides():
    assert apply('--start=a=b==')['start'] == 'a=b=='
    assert apply('--start==')['start'] == '=' and apply('--start=')['start'] == ''


def test_text_is_taken_as_it_stands():
    """No quotes are removed, and what looks like another type stays text."""
    for text in ('3', 'True', '"a"', "'", ' a\n b ', '--steps=3', '(1,)', '\\n', 'é€'):
        assert apply(f'--start={text}')['start'] == text


def test_tuples():
    write('a.py', 'span = (0.25, 0.5)')
    assert apply('--span=(0.25, 0.5)') == apply('--span=0.25,0.5') == BLOCK | {'span': (0.25, 0.5)}
    assert apply('a.py')['span'] == (0.25, 0.5)


VALUES = {'steps': st.integers(), 'rate': st.floats(allow_nan=False, allow_infinity=False),
          'resume': st.booleans(), 'start': st.text(),
          'span': st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False)).map(
              tuple)}


@repeatable(max_examples=150)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_random_values_come_back_from_words_and_from_files(values):
    assume(values.get('steps', 0) >= 0)  # as LIMITS has it; numbers without limits stand in span
    words = [f'--{name}={value if name == "start" else repr(value)}'
             for name, value in values.items()]
    Path('random.py').write_text('\n'.join(f'{name} = {value!r}' for name, value in values.items()),
                                 encoding='utf-8')
    for found in (apply(*words), apply('random.py', f'--out_dir={BLOCK["out_dir"]}')):
        assert found == BLOCK | values
        assert all(type(found[name]) is type(value) for name, value in BLOCK.items())


@repeatable(max_examples=300)
@given(name=st.sampled_from(['steps', 'rate', 'resume', 'span']),
       value=st.text('0123456789.-+e,()[]{}\'"TrueFals_ ', max_size=8) | st.text(max_size=5))
def test_any_text_is_a_value_of_the_right_type_or_refused(name, value):
    try:
        literal = ast.literal_eval(value)
        literal = float(literal) if name == 'rate' and type(literal) is int else literal
    except (ValueError, SyntaxError):
        literal = None
    except TypeError:
        assume(False)  # see test_wild_words_are_refused
    kind = type(BLOCK[name])
    if name == 'resume' and value.lower() in ('true', 'false'):
        literal = value.lower() == 'true'
    if type(literal) is kind and (kind is not tuple or {*map(type, literal)} <= {int, float}):
        assert apply(f'--{name}={value}')[name] == literal
    else:
        with pytest.raises(UserError, match=f'{name} is .* must be of type {kind.__name__}'):
            apply(f'--{name}={value}')


# What is refused


@pytest.mark.parametrize('word, hint', [
    ('--stepz=3', 'did you mean steps?'), ('--start_=3', 'did you mean start?'),
    ('--learning_rate=1', '--help'), ('--=3', '--help'), ('--', '--help'),
    ('--Steps=3', 'did you mean steps?')])
def test_unknown_names_get_the_nearest_match(word, hint):
    with pytest.raises(UserError) as error:
        apply(word)
    assert f'no setting is called {word[2:].split("=")[0]!r}' in str(error.value)
    assert hint in str(error.value) and '\n' not in str(error.value)


def test_unknown_names_in_a_file_are_refused_too():
    with pytest.raises(UserError, match="'step'.*did you mean steps"):
        apply(write('a.py', 'step = 3'))


WRONG = {'steps': ['1.5', 'True', '"3"', '(3,)', 'None', '1e3'],
         'rate': ['True', '"0.5"', '(0.5,)', 'None', '1j'],
         'resume': ['0', '1', '"True"', 'None'], 'start': ['3', 'None', 'True', "b'a'", '("a",)'],
         'span': ['0.5', '[0.0, 1.0]', '"(0, 1)"']}


@pytest.mark.parametrize('name, text', [(name, text) for name in WRONG for text in WRONG[name]])
def test_wrong_types_in_a_file_are_refused(name, text):
    with pytest.raises(UserError, match=f'^{name} is .*type {type(BLOCK[name]).__name__}'):
        apply(write('a.py', f'{name} = {text}'))


@pytest.mark.parametrize('word', [
    '--steps=1.5', '--steps=many', '--steps=', '--steps', '--steps=1+1', '--rate=fast',
    '--rate=nan', '--rate=True', '--resume=1', '--resume=yes', '--resume=', '--span=0.5',
    '--span=[0, 1]', '--span=(0', '--steps=__import__("os")'])
def test_wrong_types_on_the_command_line_are_refused(word):
    name = word[2:].partition('=')[0]
    with pytest.raises(UserError, match=f'^{name} is .*type {type(BLOCK[name]).__name__}'):
        apply(word)


@pytest.mark.parametrize('text, problem', [
    ('steps = = 3', 'SyntaxError'), ('steps = 1 / 0', 'ZeroDivisionError'),
    ('import no_such_module', 'ModuleNotFoundError'), ('steps = undefined', 'NameError')])
def test_a_config_file_that_does_not_run(text, problem):
    with pytest.raises(UserError, match=f"'a.py' does not run .{problem}: ") as error:
        apply(write('a.py', text))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('word', ['nofile.py', 'steps=3', '-steps=3', '.', ''])
def test_a_word_that_is_neither_file_nor_setting(word):
    with pytest.raises(UserError, match='no config file .*--name=value'):
        apply(word)


def test_a_file_in_another_encoding_is_refused():
    Path('a.py').write_bytes('start = "é"'.encode('latin-1'))
    with pytest.raises(UserError, match='does not run'):
        apply('a.py')


@pytest.mark.parametrize('word', [
    '--start',
    '--steps={[]}',
    '--rate=1' + 400 * '0',
    'a long text ' * 30],
    ids=lambda word: word[:10])
def test_wild_words_are_refused(word):
    with pytest.raises(UserError):
        apply(word)


# Config files


def test_a_config_file_is_python():
    """It may import and compute; private names are its own."""
    write('a.py', 'import math\nimport os.path\n_base = 3\nsteps = _base * 2\nrate = math.sqrt(4)\n'
                  '# steps = 9\n"""steps = 10"""\n')
    assert apply('a.py') == BLOCK | {'steps': 6, 'rate': 2.0, 'out_dir': 'out/a'}


def test_out_dir_is_named_after_the_config_file():
    Path('deep').mkdir()
    write('deep/tiny.v2.py', 'steps = 1')
    write('own.py', 'out_dir = "elsewhere"')
    for words, out_dir in ((['deep/tiny.v2.py'], 'out/tiny.v2'), (['own.py'], 'elsewhere'),
                           (['own.py', 'deep/tiny.v2.py'], 'out/tiny.v2'),
                           (['deep/tiny.v2.py', '--out_dir=x'], 'x'),
                           (['--out_dir=x', 'deep/tiny.v2.py'], 'out/tiny.v2'),
                           (['--steps=3'], BLOCK['out_dir'])):
        assert apply(*words)['out_dir'] == out_dir
    without = {name: value for name, value in BLOCK.items() if name != 'out_dir'}
    assert config.override(without, ['deep/tiny.v2.py']) == without | {'steps': 1}


# Scripts as they are run

SCRIPT = '''"""A script.

    python script.py --steps=3
"""

import sys

import config

# what is read
out_dir = 'out/here'   # a run
# how
steps = 8              # how many,
                       # in all
rate = 0.5             # per step
WIDTH = 3
names = ('a',
         'b')          # two lines


def main():
    width = 5
    settings = config.override(globals())
    if steps == 0:
        raise ValueError('steps of 0')
    print(settings)


if __name__ == '__main__':
    main()
'''


def run(*words):
    write('script.py', SCRIPT)
    return subprocess.run([sys.executable, 'script.py', *words], text=True, capture_output=True,
                          env={'PYTHONPATH': str(REPOSITORY)})


def test_a_script_sees_its_settings():
    write('small.py', 'rate = 1')
    done = run('small.py', '--steps=3')
    assert (done.returncode, done.stderr) == (0, '')
    assert ast.literal_eval(done.stdout) == {'out_dir': 'out/small', 'steps': 3, 'rate': 1.0,
                                             'names': ('a', 'b')}


def test_a_user_error_is_one_line_and_status_2():
    done = run('--step=3')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == "error: no setting is called 'step', did you mean steps?\n"


def test_other_exceptions_keep_their_traceback():
    done = run('--steps=0')
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr.startswith('Traceback') and 'ValueError: steps of 0' in done.stderr


@pytest.mark.parametrize('words', [['--help'], ['-h'], ['--steps=3', '--help', '--nonsense']])
def test_help_prints_the_docstring_and_the_block(words):
    done = run(*words)
    begin, end = SCRIPT.index('# what is read'), SCRIPT.index('\n\n\ndef main')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == SCRIPT[3:SCRIPT.index('"""\n\nimport')] + '\n' + SCRIPT[begin:end] + '\n'


def test_show_one_line_is_not_for_bugs(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(sys, '__excepthook__', lambda *error: shown.append(error))
    trace = ValueError, ValueError('a bug'), None
    config.show_one_line(*trace)
    assert shown == [trace] and capsys.readouterr().err == ''

    class Finer(UserError):
        pass

    for kind in (UserError, Finer):
        with pytest.raises(SystemExit) as leaving:
            config.show_one_line(kind, kind('mend this'), None)
        assert leaving.value.code == 2 and capsys.readouterr() == ('', 'error: mend this\n')
    with pytest.raises(SystemExit):  # a message may quote a text of many lines
        config.show_one_line(UserError, UserError('it is "two\r\nlines"'), None)
    assert capsys.readouterr().err == 'error: it is "two lines"\n'
    with pytest.raises(SystemExit):  # neither is a full disk a bug
        config.show_one_line(OSError, OSError(28, 'No space left on device', 'x.bin'), None)
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'x.bin'\n"
    for error, said, status in (
            (KeyboardInterrupt(), 'stopped', 130), (MemoryError(), 'out of memory', 2),
            (RuntimeError("can't allocate memory: 9 GB\nC++ trace"), 'lower batch_size', 2),
            (RuntimeError('MPS backend out of memory (MPS allocated: 9 GB)'), 'batch_size: MPS', 2),
            (UnicodeEncodeError('utf-8', '\udce9', 0, 1, 'surrogates'), 'surrogates', 2)):
        with pytest.raises(SystemExit) as leaving:
            config.show_one_line(type(error), error, None)
        err = capsys.readouterr().err
        assert leaving.value.code == status and said in err and err.count('\n') == 1
    assert len(shown) == 1


def test_override_installs_it():
    apply()
    assert sys.excepthook is config.show_one_line


def test_help_ends_with_the_block_even_if_a_setting_is_changed_later():
    write('script.py', '"""A script."""\n\n# how\nsteps = 8\n\n\ndef f():\n    pass\n\n\n'
                       'steps = steps + 1\n')
    assert config.help_text('script.py', ['steps']) == 'A script.\n# how\nsteps = 8'


@pytest.mark.parametrize('script', [
    'train.py',
    'sample.py', 'eval.py', 'prepare.py'])
def test_help_of_the_real_scripts_holds_every_setting_and_no_code(script):
    """Read from the source alone: the names assigned above the first function."""
    path = REPOSITORY / script
    tree = ast.parse(path.read_text(encoding='utf-8'))
    above = itertools.takewhile(lambda node: not isinstance(node, ast.FunctionDef), tree.body)
    names = [node.targets[0].id for node in above if isinstance(node, ast.Assign)
             and isinstance(node.targets[0], ast.Name) and node.targets[0].id.islower()
             and isinstance(node.value, (ast.Constant, ast.Tuple, ast.UnaryOp))]
    text = config.help_text(path, names)
    assert text.startswith(ast.get_docstring(tree, clean=False))
    block = ast.parse(text[len(ast.get_docstring(tree, clean=False)):])
    assert [node.targets[0].id for node in block.body] == names and len(names) > 4


@pytest.mark.parametrize('script', ['train', 'sample', 'eval'])
def test_scripts_start_without_what_only_unix_has(script, tmp_path):
    """Windows has no module resource; a console of cp1252 prints no mask and no arrow."""
    code = (f"import sys; sys.modules['resource'] = None; import {script}, config; "
            "config.override({'__file__': 'x'}, []); print('█ → done')")
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {'PYTHONIOENCODING': 'cp1252', 'PYTHONPATH':
                                                       str(REPOSITORY)})
    assert done.returncode == 0 and done.stdout == '? ? done\n', done.stderr


@pytest.mark.parametrize('name, wrong, right, said', [
    ('batch_size', (0, -3), (1, 10 ** 9), '1 or more'),
    ('steps', (-1,), (0, 7), '0 or more'),
    ('top_p', (0.0, 1.5, float('nan')), (1e-9, 1.0), 'in (0, 1]'),
    ('temperature', (-0.1, float('inf'), float('nan')), (0.0, 9.9), '0 or more'),
    ('beta1', (1.0,), (0.0, 0.999), 'in [0, 1)'),
    ('seed', (-1, 10 ** 19), (0, 2 ** 62), 'in [0, '),
    ('repetition_penalty', (0.0, float('inf')), (0.5, 2.0), 'in (0, inf)'),
    ('mask_range', ((0.0, 1.1), (-0.1, 0.5)), ((0.0, 1.0),), 'in [0, 1]')])
def test_limits_are_those_of_intervals(name, wrong, right, said):
    for value in right:
        assert config.override({name: value}, []) == {name: value}
    for value in wrong:
        with pytest.raises(UserError, match=re.escape(said)):
            config.override({name: value}, [])


def test_every_limit_is_of_a_setting_and_allows_its_default():
    blocks = {}
    for script in ('train', 'sample', 'eval', 'prepare'):
        tree = ast.parse((REPOSITORY / f'{script}.py').read_text(encoding='utf-8'))
        above = itertools.takewhile(lambda node: not isinstance(node, ast.FunctionDef), tree.body)
        blocks |= {node.targets[0].id: script for node in above if isinstance(node, ast.Assign)
                   and isinstance(node.targets[0], ast.Name)}
    assert not set(' '.join(config.LIMITS.values()).split()) - blocks.keys()


def test_a_script_inherits_settings_with_their_defaults_types_and_limits(tmp_path, capsys):
    write('other.py', '\n\n# how\ntop_p = 0.9  # nucleus\nwords = ""\n\n\ndef main():\n    0\n')
    other = types.SimpleNamespace(__name__='other', __file__='other.py', top_p=0.9, words='')
    script = {'steps': 8, '__file__': 'other.py'}
    found = config.override(script, ['--top_p=1', '--steps=3'], other, ('top_p', 'words'))
    assert found == {'steps': 3, 'top_p': 1.0, 'words': ''} and other.top_p == 0.9
    assert script == {'steps': 3, '__file__': 'other.py'}
    for wrong in ('--top_p=2', '--top_p=a', '--top_q=0.5'):
        with pytest.raises(UserError, match='top_'):
            config.override(dict(script), [wrong], other, ('top_p', 'words'))
    help_of_both = config.help_text('other.py', ('top_p', 'words'), docstring=False)
    assert help_of_both == '# how\ntop_p = 0.9  # nucleus\nwords = ""'


@pytest.mark.parametrize('word, found', [
    ('--compile', 'on'), ('--compile=True', 'on'), ('--compile=False', 'off'),
    ('--compile=auto', 'auto'), ('--compile=off', 'off')])
def test_a_switch_of_three_positions_takes_what_a_boolean_took(word, found):
    assert config.override({'compile': 'auto'}, [word]) == {'compile': found}
    write('a.py', f'compile = {found == "on"}')
    assert config.override({'compile': 'auto'}, ['a.py'])['compile'] in ('on', 'off')


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'x'
    config.write_atomically(path, b'old')

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left'):
        config.write_atomically(path, b'new')
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]
