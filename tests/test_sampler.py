"""How the runtime draws tokens, against probabilities computed from the formulas."""

import numpy as np
import pytest

import edgelora
from edgelora.errors import EdgeLoraError
from edgelora.generation import Sampling
from toy_bundle import NAN_TOKEN, VOCAB_SIZE, write_toy_bundle

PROMPT = [5, 9, 5, 40, 12]
DRAWS = 3000


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    bundle = write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")
    with edgelora.load(bundle) as model, model.session() as session:
        session.prefill(PROMPT)
        yield session


def draw(session, **settings):
    """One token after the prompt, whatever it is."""
    session.rewind(len(PROMPT))
    return session.generate(1, Sampling(ignore_eos=True, **settings))[0][0]


def probabilities(
    logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
):
    """Softmax after the filters, in transformers' order, float64 [vocab_size]."""
    scores = logits.astype(np.float64)
    for token in set(PROMPT):
        factor = repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
        scores[token] *= factor
    p = softmax(scores / temperature)
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]  # probability of the better ones
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.fixture(scope="module")
def logits(session):
    session.rewind(len(PROMPT) - 1)
    session.prefill(PROMPT[-1:])
    return session.last_logits


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 3.0},
        {"temperature": 2.0, "top_k": 4},
        {"temperature": 2.0, "top_k": VOCAB_SIZE + 5},
        {"temperature": 3.0, "top_p": 0.6},
        {"temperature": 3.0, "min_p": 0.2},
        {"temperature": 4.0, "repetition_penalty": 3.0},
        {"temperature": 4.0, "repetition_penalty": 0.5},
        {"temperature": 4.0, "top_k": 12, "top_p": 0.8, "min_p": 0.3, "repetition_penalty": 1.5},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_draws_follow_the_filtered_distribution(session, logits, settings):
    expected = probabilities(logits, **settings)
    drawn = [draw(session, seed=seed, **settings) for seed in range(DRAWS)]
    counts = np.bincount(drawn, minlength=VOCAB_SIZE)
    assert not counts[expected == 0].any()
    deviation = np.sqrt(DRAWS * expected * (1 - expected))
    assert (np.abs(counts - DRAWS * expected) <= 5 * deviation + 1e-9).all()


def test_greedy_takes_the_largest_logit(session, logits):
    assert draw(session) == logits.argmax()
    assert draw(session, seed=7, top_k=3, top_p=0.5) == logits.argmax()


def test_penalty_acts_on_greedy_choice_and_on_new_tokens(session, logits):
    expected = probabilities(logits, repetition_penalty=50.0).argmax()
    assert draw(session, repetition_penalty=50.0) == expected
    session.rewind(len(PROMPT))
    new, _ = session.generate(12, Sampling(ignore_eos=True, repetition_penalty=1e6))
    positive = [token for token in new if token != NAN_TOKEN]
    assert len(set(positive)) == len(positive)


def test_top_k_of_one_is_greedy(session, logits):
    assert {draw(session, temperature=5.0, top_k=1, seed=s) for s in range(20)} == {logits.argmax()}


def test_tiny_temperature_is_greedy(session, logits):
    assert {draw(session, temperature=1e-30, seed=s) for s in range(20)} == {logits.argmax()}


def test_same_seed_gives_the_same_tokens_and_another_seed_others(session):
    def tokens(seed):
        session.rewind(len(PROMPT))
        return session.generate(20, Sampling(temperature=2.0, seed=seed, ignore_eos=True))[0]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(2**64 - 1) == tokens(2**64 - 1)


def test_first_draw_is_that_of_splitmix64(session, logits):
    """SplitMix64 from seed 0 begins with 0xe220a8397b1dcdaf, on every platform."""
    uniform = (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    expected = np.searchsorted(np.cumsum(probabilities(logits, temperature=3.0)), uniform)
    assert draw(session, temperature=3.0, seed=0) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_option_out_of_range_is_refused_by_name(session, name, value):
    with pytest.raises(EdgeLoraError, match=f"{name} is .*, not "):
        draw(session, **{name: value})


def test_eos_ends_and_is_not_part_of_the_sequence(session, logits):
    session.rewind(len(PROMPT))
    seeds = (s for s in range(10_000) if _first(session, s) == "stop")
    assert next(seeds) is not None
    assert session.position == len(PROMPT)


def _first(session, seed):
    session.rewind(len(PROMPT))
    return session.generate(1, Sampling(temperature=5.0, seed=seed))[1]
