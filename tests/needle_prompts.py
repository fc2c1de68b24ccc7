"""Prompts that ask for one code among facts, as the shipped CLSA model knows them."""

import random

from deltadecode.lab.tasks.chain import make_problem
from deltadecode.lab.tasks.vocabulary import NAMES

CODES = 4


def needles(seed, count, facts):
    """So many prompts, each of so many facts and of codes among them, and the code asked for."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        lines = make_problem(rng.getrandbits(62), 1, facts).prompt.split("\n")[1 : facts + 1]
        codes = {name: str(rng.randrange(10**6, 10**7)) for name in rng.sample(NAMES, CODES)}
        for name, code in codes.items():
            lines.insert(rng.randrange(len(lines)), f"the code of {name} is {code}")
        name = rng.choice(list(codes))
        made.append(("\n".join(["Facts", *lines, f"Question the code of {name} is"]), codes[name]))
    return made
