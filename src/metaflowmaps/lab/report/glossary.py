"""The words of a page, explained on it: what every report speaks of, and the methods that this one names."""

from collections.abc import Iterable

from metaflowmaps.lab.report.page import escaped
from metaflowmaps.steering import Method
from metaflowmaps.work.choices import choices

WORDS = {
    "t": "Time, without unit: 0 is pure noise, 1 is clean data.",
    "draw": "A clean sample that a noisy state may have come from, p(x₁ | xₜ). The map makes one by one network call.",
    "reward": "What a sample is worth, by a function of it; in that function's own unit.",
    "diversity": "Mean distance between two samples, in the features of a classifier that no method sees. Near 0, all "
    "samples are alike.",
    "evaluations": "Calls of the network and of the reward for one sample, a differentiated one counted twice (NFE).",
    "seconds": "Time for one sample on the machine that made the page, samples made many at a time.",
    "seed": "The number that a sample's noise comes from: the same seed makes the same sample.",
    "λ": "Strength: the reward is multiplied by it. At λ = 0 nothing is steered.",
    "SW2 / floor": "Distance to exact samples (sliced W2), in multiples of that between two exact sets: 1 is best.",
}


def glossary(text: str, methods: Iterable[str]) -> str:
    """Those words that stand in a text, and methods by their names; what is no method of the package is left out."""
    known = choices(Method)
    named = {name: known[name] for name in dict.fromkeys(methods) if name in known}
    terms = {term: words for term, words in WORDS.items() if term in text}
    terms |= {method.titled(): method.in_words for method in named.values() if method.in_words}
    rows = "".join(f"<dt>{escaped(term)}</dt><dd>{escaped(words)}</dd>" for term, words in terms.items())
    return f'<footer id="words"><h2>The words on this page</h2><dl>{rows}</dl></footer>'
