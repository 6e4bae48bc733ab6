"""Settings: a flat block of `name = value` lines in a script, overridden from outside.

    python train.py config/shakespeare_mdm.py --max_iters=100 --compile

Files of `name = value` lines and `--name=value` words are applied from left to right, so the last
one wins. A name the script does not have, or a value of another type than its default, ends the
script with one line. `--help` prints the block.
"""

import ast
import difflib
import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: shown as one line, exit status 2, nothing overwritten."""


def show_one_line(kind, error, trace):
    """sys.excepthook of every script: no traceback for what is no bug.

    A full disk, text in no known encoding, Ctrl-C, and too little memory, of whatever device.
    """
    if issubclass(kind, KeyboardInterrupt):
        error = 'stopped'
    elif 'Memory' in kind.__name__ or "can't allocate memory" in str(error):
        error = f'out of memory, lower batch_size, block_size: {" ".join(str(error).split())[:99]}'
    elif not issubclass(kind, (UserError, OSError, UnicodeError)):
        return sys.__excepthook__(kind, error, trace)
    print(f'error: {error}', file=sys.stderr)
    sys.exit(130 if issubclass(kind, KeyboardInterrupt) else 2)


def override(settings, argv=None):
    """Applies config files and --name=value words to `settings`, the globals() of a script.

    Settings are the lower-case globals that hold a bool, int, float, str or tuple; the type of the
    default is the type of the setting. A config file also sets out_dir to out/<its name>, unless
    it or a later word sets it. Returns the settings as a dict, to be kept with the run.
    """
    sys.excepthook = show_one_line
    for stream in filter(lambda s: hasattr(s, 'reconfigure'), (sys.stdout, sys.stderr)):
        stream.reconfigure(errors='replace')  # a console that has no mask or arrow shows a '?'
    names = [n for n, v in settings.items() if not n.startswith('_') and n.islower()
             and isinstance(v, (bool, int, float, str, tuple))]
    for word in sys.argv[1:] if argv is None else argv:
        if word in ('--help', '-h'):
            print(help_text(settings['__file__'], names))
            sys.exit(0)
        if not word.startswith('--'):
            given = read_config(word)
            if 'out_dir' in names:
                settings['out_dir'] = f'out/{Path(word).stem}'
        else:  # the first '=' only, for --start=a=b; --resume is short for --resume=True
            name, equals, value = word[2:].partition('=')
            given = {name: value if equals else True}
        for name, value in given.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f', did you mean {near[0]}?' if near else ' (--help lists them)'
                raise UserError(f'no setting is called {name!r}{hint}')
            settings[name] = convert(name, value, settings[name], word.startswith('--'))
    return {name: settings[name] for name in names}


def convert(name, value, default, from_text):
    """The value for a setting whose default is `default`; an int does for a float."""
    kind = type(default)
    with suppress(Exception):  # what cannot be read stays as it is, and is refused below
        if from_text and kind is not str and type(value) is str:
            value = ast.literal_eval(value.capitalize() if kind is bool else value)
        if kind is float and type(value) is int:
            value = float(value)
    if type(value) is not kind or kind is tuple and {*map(type, value)} - {int, float}:
        hint = f': write --{name}=VALUE' * (value is True) + ' of numbers' * (kind is tuple)
        raise UserError(f'{name} is {value!r}, but it must be of type {kind.__name__}{hint}')
    return value


def read_config(path):
    """The name = value pairs of a plain-Python file."""
    if not os.path.isfile(path):
        raise UserError(f'there is no config file {path!r} (a setting is written --name=value)')
    try:
        found = runpy.run_path(path)
    except Exception as e:
        raise UserError(f'config file {path!r} does not run: {type(e).__name__}: {e}') from e
    return {n: v for n, v in found.items() if not n.startswith('_') and type(v) is not type(ast)}


def help_text(path, names):
    """The docstring of the script and its block of settings, as they stand in its source."""
    source = Path(path).read_text(encoding='utf-8')
    tree = ast.parse(source)
    rows = [next(node for node in tree.body if isinstance(node, ast.Assign)
                 and getattr(node.targets[0], 'id', None) == name) for name in names]
    block = source.splitlines()[rows[0].lineno - 2:rows[-1].end_lineno]  # -2: the first heading
    return '\n'.join([ast.get_docstring(tree, clean=False), *block])
