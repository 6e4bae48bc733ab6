"""Made-up facts 'A is B.': does a model that was trained on them know that 'B is A.'?

Made here in seconds, 550 kB. After Berglund et al., The Reversal Curse, 2023 [2309.12288].
"""

import random

JOBS = ['baker', 'tailor', 'judge', 'singer', 'miller', 'painter', 'guard', 'sailor']


def make(folder, n=200, repeats=50, seed=0):
    """(path, source in words) of n facts, a line each, in which A is a name and B a description.

    Every second fact is written as 'B is A.' too, so that a model sees sentences of that kind; the
    others only as 'A is B.' All stand there `repeats` times, each time in another order."""
    rng = random.Random(seed)

    def word(syllables):
        return ''.join(rng.choice('bdfgklmnprstvz') + rng.choice('aeiou') for _ in range(syllables))

    lines = []
    for i in range(n):
        a = f'{word(3)} {word(2)}'.title()
        b = f'the {rng.choice(JOBS)} of {word(3).title()}'
        lines += [f'{a} is {b}.'] + [f'{b} is {a}.'] * (i % 2)
    path = folder / 'reversal.txt'
    with open(path, 'w', encoding='utf-8', newline='') as f:
        for _ in range(repeats):
            f.write('\n'.join(rng.sample(lines, len(lines))) + '\n')
    return path, 'made by prepare.py'
