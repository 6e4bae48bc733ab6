"""Made-up facts 'A is B.', for the reversal curse: does a model that read them know 'B is A.'?

Made here in seconds, 550 kB. After Berglund et al., The Reversal Curse, 2023 [2309.12288].
"""

import random

files = {'reversal.txt': None}
tokenizer = 'char'
JOBS = ['baker', 'tailor', 'judge', 'singer', 'miller', 'painter', 'guard', 'sailor']


def make(folder, n=200, repeats=50, seed=0):
    """Writes n facts into folder/reversal.txt, a line each. A is a name and B a description.

    Every second fact is told as 'B is A.' too, so that a model sees what such a sentence means; the
    others in one direction only. All are told `repeats` times, each time in another order."""
    r = random.Random(seed)

    def word(syllables):
        return ''.join(r.choice('bdfgklmnprstvz') + r.choice('aeiou') for _ in range(syllables))

    lines = []
    for i in range(n):
        a = f'{word(3)} {word(2)}'.title()
        b = f'the {r.choice(JOBS)} of {word(3).title()}'
        lines += [f'{a} is {b}.'] + [f'{b} is {a}.'] * (i % 2)
    path = folder / 'reversal.txt'
    with open(path, 'w', encoding='utf-8', newline='') as f:
        for _ in range(repeats):
            f.write('\n'.join(r.sample(lines, len(lines))) + '\n')
    return path, 'made by prepare.py'
