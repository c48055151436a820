"""Files that are damaged, or written by somebody who knows the checksum."""

import copy

import torch

ODD = [
    *(None, True, -1, 0, 3, 2**31, 10**18, 0.5, 1e308, float("nan"), "", "x", "normal"),
    *([], {}, [[]], {"kind": "pruned"}, ["a", 1]),
    *(torch.zeros(3), torch.zeros(0), torch.ones(()), torch.zeros(0, 10**9), torch.ones(2) > 0),
    *(torch.zeros(2, 2, 2, 2), torch.zeros(20_000), torch.arange(3), torch.full((4,), torch.nan)),
]


def damage(content, random):
    """Return other bytes: bits that flip, a part that is lost, or zeroed, or doubled, or moved."""
    damaged = bytearray(content)
    start, end = sorted(random.sample(range(len(content) + 1), 2))
    match random.randrange(6):
        case 0 | 1:
            for _ in range(random.choice([1, 1, 1, 2, 8])):
                damaged[random.randrange(len(content))] ^= 1 << random.randrange(8)
        case 2:
            del damaged[start:]
        case 3:
            damaged[start:end] = bytes(end - start)
        case 4:
            damaged += damaged[start:end]
        case 5:
            del damaged[start:end]
    return bytes(damaged)


def forge(plan, random):
    """Return a plan in which one to three things are of another kind, missing or too many."""
    forged = copy.deepcopy(plan)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        homes = [(home, key) for home, key in _places(forged)]
        home, key = random.choice(homes)
        value = home[key]
        match random.randrange(7):
            case 0 | 1:
                home[key] = copy.deepcopy(random.choice(ODD))
            case 2:
                del home[key]
            case 3 if isinstance(home, dict):
                home[f"{key}_"] = home.pop(key)
            case 3:
                home.insert(key, value)
            case 4:
                other, place = random.choice(homes)
                home[key] = copy.deepcopy(other[place])
            case 5 if isinstance(value, torch.Tensor):
                home[key] = _change(value, random)
            case 5 if isinstance(value, dict):
                value["more"] = 1
            case 5 | 6 if isinstance(value, int | float):
                home[key] = random.choice([value + 1, -value, value * 1e9, str(value)])
            case _:
                home[key] = [value, value]
    return forged


def _places(value):
    items = enumerate(value) if isinstance(value, list) else value.items()
    for key, one in list(items):
        yield value, key
        if isinstance(one, list | dict):
            yield from _places(one)


def _change(tensor, random):
    changes = [
        lambda t: t.reshape(-1),
        lambda t: t[None],
        lambda t: t.double(),
        lambda t: t.to(torch.int64),
        lambda t: t.expand(2, *t.shape).clone(),
        lambda t: t.mT.clone() if t.dim() > 1 else t.bool(),
        lambda t: t[:1].clone() if t.dim() else t.half(),
    ]
    return random.choice(changes)(tensor)
