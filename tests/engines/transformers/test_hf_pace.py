"""How many tokens lossless mode drafts: by acceptance, and by what passes take (R12)."""

import pytest
import torch
from hf_tiny import generate, make_prompt
from test_hf_lossless import models, same

import deltadecode as dd
from deltadecode.engines.times import Times
from deltadecode.engines.transformers import pace
from deltadecode.engines.transformers.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [0.0]
    monkeypatch.setattr(pace, "clock", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def drive(paced, move, steps, *, chance, plain, draft, verify):
    """Decode so many tokens on a clock; how many were drafted for, and seconds in all."""
    torch.manual_seed(1)
    drafted, seconds, selected = [], 0.0, False
    while steps > 0:
        count = paced.begin()
        count = count if selected else 0
        selected = paced.selects
        kept = 1 + int((torch.rand(count) < chance).cumprod(dim=0).sum())
        taken = count * draft + verify if count else plain
        move(taken)
        paced.end(count, kept)
        drafted.append(count)
        seconds += taken
        steps -= kept
    return drafted, seconds


@pytest.mark.parametrize(
    "chance, least, most", [(1.0, 8, 8), (0.95, 4, 8), (0.8, 1, 3), (0.3, 1, 1)]
)
def test_rule12_drafts_follow_acceptance(clock, chance, least, most):
    drafted, _ = drive(
        Pace(8, fixed=False), clock, 600, chance=chance, plain=1, draft=0.1, verify=1
    )
    assert drafted[1] == 4
    late = sorted(drafted[len(drafted) // 2 :])
    assert least <= late[len(late) // 2] <= most
    assert max(drafted) <= 8 and min(drafted[1:]) >= 1


def test_a_number_that_is_given_stays(clock):
    drafted, _ = drive(Pace(5), clock, 100, chance=0.2, plain=1, draft=9, verify=9)
    assert set(drafted[1:]) == {5}


def test_rule12_drafts_that_take_longer_than_they_give_end(clock):
    times = Times()
    slow = {"chance": 0.6, "plain": 1.0, "draft": 1.0, "verify": 1.3}
    drafted, seconds = drive(Pace(8, False, times), clock, 3000, **slow)
    assert sum(count > 0 for count in drafted) > 3  # tried again now and then
    assert seconds < 1.02 * 3000
    # What is known is known to the next call.
    drafted, _ = drive(Pace(8, False, times), clock, 100, **slow)
    assert not any(drafted[:30]) and sum(count > 0 for count in drafted) <= 3


def test_rule12_drafts_that_pay_go_on(clock):
    quick = {"chance": 0.95, "plain": 1.0, "draft": 0.2, "verify": 1.2}
    drafted, seconds = drive(Pace(8, False, Times()), clock, 2000, **quick)
    assert seconds < 0.5 * 2000
    assert 1 < sum(count == 0 for count in drafted) < 60  # a plain step for comparison
    # A context that grows makes a plain step slower: drafts begin when they pay.
    times = Times()
    drive(Pace(8, False, times), clock, 500, **{**quick, "draft": 1.0})
    drafted, _ = drive(Pace(8, False, times), clock, 2000, **quick)
    assert sum(count > 0 for count in drafted[-100:]) > 80


def test_the_clock_changes_no_token(monkeypatch):
    """Every pass takes a time of its own, of seconds or of years."""
    stock, _ = models()
    expected = generate(stock, make_prompt(60), 60)
    for base in (1.0, 1.7, 0.6):
        now = [0.0, 1.0]

        def tick(base=base, now=now):
            now[0], now[1] = now[0] + now[1], now[1] * base
            return now[0]

        monkeypatch.setattr(pace, "clock", tick)
        _, ours = models(draft_tokens=None)
        same(generate(ours, make_prompt(60), 60), expected)
        counts = dd.stats(ours)
        assert counts.full_tokens == ours.config.num_hidden_layers * sum(range(61, 120))


def test_a_seed_gives_the_same_sampled_tokens_again(monkeypatch):
    texts = []
    for number in (1, 2):
        now = iter(range(0, 10_000_000, number))
        monkeypatch.setattr(pace, "clock", lambda now=now, number=number: next(now) ** number)
        _, ours = models(draft_tokens=None)
        torch.manual_seed(3)
        texts.append(ours.generate(make_prompt(60), max_new_tokens=50, do_sample=True))
        assert dd.stats(ours).drafted > 0
    assert torch.equal(*texts)
