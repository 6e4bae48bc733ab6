"""Settings: a flat block of `name = value` lines at the top of a script, changed from outside.

    python train.py config/shakespeare_mdm.py --max_iters=100 --compile

A word of the command line is a file of `name = value` lines, or `--name=value`. Words are applied
from left to right, so the last one wins. A mistake ends the script with one line: a name that the
script does not have, a value of another type than the default, a number outside its limits.
`--help` prints the block. A script calls override(globals()) before it reads its settings.
"""

import ast
import difflib
import os
import runpy
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

LIMITS = {  # {interval: names of the settings that must lie in it, whichever script has them}
    '[0, inf)': 'train_tokens attn_anneal pad_curriculum n_head n_kv_head n_conv n_hidden '
                'embed_scale w_max block_length max_iters learning_rate muon_lr bench warmup_iters '
                'weight_decay grad_clip steps guidance temperature top_k '
                'max_windows target_se answer_steps max_rows max_docs',
    '[1, inf)': 'batch_size gradient_accumulation_steps block_size n_layer n_embd diffusion_steps '
                'eval_interval log_interval eval_repeats num_samples length_candidates gen_tokens',
    '[2, inf)': 'repeats',  # fewer have no standard error
    '(0, inf)': 'repetition_penalty',
    '[0, 1]': 'random_length row_share dropout attn_dropout mask_range eta',
    '[0, 1)': 'beta1 beta2 val_share cool',
    '(0, 1]': 'length_quantile threshold top_p levels',
    '[0, 9e18]': 'seed',  # below 2^63
    '[0, 1e9]': 'vocab_size epochs',
    '[0, 999999]': 'gen_length length_line',
    '[1, 1e6]': 'max_prompt max_answer discrete_steps grid_steps'}


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2, nothing overwritten."""


def require(name, value, fine, wanted):
    """Raises UserError unless the value of a setting is fine."""
    if not fine:
        raise UserError(f'{name} is {value!r}, but it must be {wanted}')


def one_of(name, value, known):
    """Raises UserError unless the value of a setting is one of the known names."""
    if value not in known:
        raise UserError(f'{name} is {value!r}, not one of {", ".join(filter(None, known))}')


@contextmanager
def as_user_error(kinds, problem, advice=''):
    """Turns an exception of these kinds into a UserError: problem (what the exception says)advice.

    It is one line, whatever the exception says."""
    try:
        yield
    except kinds as e:
        said = ' '.join(str(e).split())[:200]
        raise UserError(f'{problem} ({type(e).__name__}: {said}){advice}') from e


def check_limits(settings):
    """Raises UserError for the first number outside its interval; nan is outside of all.

    Of a tuple, every number must lie inside."""
    interval_of = {name: interval for interval, names in LIMITS.items() for name in names.split()}
    for name in [name for name in settings if name in interval_of]:
        interval, value = interval_of[name], settings[name]
        low, high = (float(end) for end in interval[1:-1].split(','))
        wanted = f'{low:g} or more' if interval == f'[{low:g}, inf)' else f'in {interval}'
        for number in value if isinstance(value, tuple) else (value,):
            above = number >= low if interval[0] == '[' else number > low
            below = number <= high if interval[-1] == ']' else number < high
            require(name, value, above and below, wanted)


def show_one_line(kind, error, trace):
    """sys.excepthook of every script: one line instead of a traceback, unless it is a bug.

    Not bugs: UserError, an OSError (a full disk, a file that is gone), text in an unknown encoding,
    Ctrl-C, and too little memory, be it the GPU's or the CPU's.
    """
    if issubclass(kind, KeyboardInterrupt):
        error = 'stopped'
    elif 'Memory' in kind.__name__ or any(  # of GPUs; of CPUs, of MPS
            said in str(error) for said in ("can't allocate memory", 'out of memory')):
        error = f'out of memory, lower batch_size: {" ".join(str(error).split())[:99]}'
    elif not issubclass(kind, (UserError, OSError, UnicodeError)):
        return sys.__excepthook__(kind, error, trace)
    # written at once: print() would mix the words of the processes of a torchrun
    sys.stderr.write(f'error: {" ".join(str(error).splitlines())}\n')
    sys.exit(130 if issubclass(kind, KeyboardInterrupt) else 2)


def names_of(settings):
    """Names of a script's settings: its lower-case globals that hold a bool, number, str or tuple.

    settings: the globals() of the script."""
    return [n for n, v in settings.items() if not n.startswith('_') and n.islower()
            and isinstance(v, (bool, int, float, str, tuple))]


def override(settings, argv=None, inherited=None, names=(), earlier={}):
    """Applies config files and --name=value words to `settings`, the globals() of a script.

    argv: the words, by default those of the command line. A config file also sets out_dir to
    out/<its name>, unless it or a later word sets out_dir.
    names, inherited: settings of another script, and its module: eval.py takes those of decoding
    from sample.py. They are returned, but not written into `settings`.
    earlier: {name: value} of another run (one that is resumed, or whose shape this one takes), in
    place of the defaults; the words change these.
    Returns {name: value} of all settings. Also installs show_one_line, and lets a console print '?'
    for a character that it lacks.
    """
    sys.excepthook = show_one_line
    for stream in filter(lambda s: hasattr(s, 'reconfigure'), (sys.stdout, sys.stderr)):
        stream.reconfigure(errors='replace')
    own = names_of(settings)
    found = {n: settings[n] for n in own} | {n: vars(inherited)[n] for n in names}
    found |= {n: convert(n, v, found[n], False) for n, v in earlier.items() if n in found}
    for word in sys.argv[1:] if argv is None else argv:
        if word in ('--help', '-h'):
            print(help_text(settings['__file__'], own))
            if names:
                print(f'\nand, of {inherited.__name__}.py,\n'
                      + help_text(inherited.__file__, names, docstring=False))
            sys.exit(0)
        if not word.startswith('--'):
            given = read_config(word)
            if 'out_dir' in found:
                found['out_dir'] = f'out/{Path(word).stem}'
        else:  # split at the first '=' alone: --start=a=b; --resume is short for --resume=True
            name, equals, value = word[2:].partition('=')
            given = {name: value if equals else True}
        for name, value in given.items():
            if name not in found:
                near = difflib.get_close_matches(name, found, 1)
                hint = f', did you mean {near[0]}?' if near else ' (--help lists them)'
                raise UserError(f'no setting is called {name!r}{hint}')
            found[name] = convert(name, value, found[name], word.startswith('--'))
            if name == 'epochs':
                require(name, found[name], found[name] > 0, 'above 0')
            elif name == 'max_iters':  # the other way to say it: of the two, the later counts
                found['epochs'] = 0.0
    check_limits(found)
    settings.update({name: found[name] for name in own})
    return found


def convert(name, value, default, from_text):
    """The value in the type of the setting's default; UserError if it has another type.

    from_text: it may be the text of a Python literal. An int does for a float."""
    kind = type(default)
    if name == 'compile':  # --compile means on, --compile=False means off
        value = {'True': 'on', 'False': 'off'}.get(str(value).capitalize(), value)
    with suppress(Exception):  # text that is no literal stays text, and is refused below
        if from_text and kind is not str and type(value) is str:
            value = ast.literal_eval(value.capitalize() if kind is bool else value)
        if kind is float and type(value) is int:
            value = float(value)
    if type(value) is not kind or kind is tuple and {*map(type, value)} - {int, float}:
        of_what = ' of numbers, as (8,) or (4, 8)' * (kind is tuple)
        hint = of_what + f': write --{name}=VALUE' * (value is True)
        raise UserError(f'{name} is {value!r}, but it must be of type {kind.__name__}{hint}')
    return value


def read_config(path):
    """{name: value} of a config file, run as Python, without imported modules. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f'there is no config file {path!r} (a setting is written --name=value)')
    with as_user_error(Exception, f'config file {path!r} does not run'):
        found = runpy.run_path(path)
    return {n: v for n, v in found.items() if not n.startswith('_') and type(v) is not type(ast)}


def help_text(path, names, docstring=True):
    """The docstring of a script and its block of settings, as both stand in its source.

    The block reaches from the first of `names` to the last, with all comments."""
    source = Path(path).read_text(encoding='utf-8')
    tree = ast.parse(source)
    nodes = [next(node for node in tree.body if isinstance(node, ast.Assign)  # the first of several
                  and getattr(node.targets[0], 'id', None) == name) for name in names]
    block = source.splitlines()[nodes[0].lineno - 2:nodes[-1].end_lineno]  # -2: with the heading
    return '\n'.join([ast.get_docstring(tree, clean=False), *block] if docstring else block)


def write_atomically(path, content):
    """Writes bytes; `path` holds, at every moment, all of the old content or all of the new.

    Raises UserError where they cannot be written; the old content is then still there."""
    path = Path(path)
    part = path.with_name(path.name + '.part')
    try:
        with open(part, 'wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        intact = '; the one before it is intact' * path.exists()
        raise UserError(f'cannot write {path} ({e.strerror}){intact}') from e
