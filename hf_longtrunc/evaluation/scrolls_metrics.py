"""SCROLLS' official metrics: ROUGE, F1 and exact match, with the keys of the benchmark's own evaluator.

F1 and exact match compare `normalized` texts; ROUGE uses rouge-score's tokenizer without stemming. A prediction's score
is the best over the references of its id, for each kind of ROUGE separately. Scores are averaged over examples, times
100, to four decimals; ROUGE's geometric mean is that of the averages.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import TYPE_CHECKING, Any

from hf_longtrunc.extras import missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

METRICS = {
    "gov_report": "rouge",
    "summ_screen_fd": "rouge",
    "qmsum": "rouge",
    "narrative_qa": "f1",
    "qasper": "f1",
    "quality": "exact_match",
    "contract_nli": "exact_match",
}

_ROUGES = ("rouge1", "rouge2", "rougeL")
_NAMED = 5  # ids that a message names


def evaluate(task: str, predictions: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Score predictions as the official evaluator does.

    Args:
        task: a SCROLLS task, one of `METRICS`.
        predictions: id -> predicted text.
        rows: the split's rows, each with an "id" and an "output"; several rows of one id are several references.

    Returns:
        The official dictionary: the metrics in percent, "num_predicted", "mean_prediction_length_characters",
        "scrolls_score", "display_keys" and "display". "rouge/rougeLsum", which counts towards neither score nor
        display, is None where `nltk.download("punkt_tab")` was never run.

    Raises:
        ValueError: an unknown task, missing or redundant ids, rows without outputs (the test split's are private).
        TypeError: predictions that map no texts to texts.
        ModuleNotFoundError: ROUGE needs rouge-score, in the extra `eval`.

    Cost: ROUGE-L takes time proportional to prediction times reference, some 0.1 s for two texts of 500 words.
    Source: Shaham et al. 2022, arXiv 2201.03533, section 4; the benchmark's evaluator.

    Examples:
        >>> evaluate("qasper", {"a": "The old keeper"}, [{"id": "a", "output": "the keeper"}])["f1"]
        66.6667
    """
    metric = _metric_of(task)
    references = _references(rows)
    _check(predictions, references)
    pairs = [(prediction, references[key]) for key, prediction in predictions.items()]
    scores = _SCORERS[metric](pairs)
    lengths = [len(prediction) for prediction in predictions.values()]
    scores |= {"num_predicted": len(lengths), "mean_prediction_length_characters": sum(lengths) / len(lengths)}
    result: dict[str, Any] = {key: None if value is None else round(value, 4) for key, value in scores.items()}
    shown = [f"rouge/{kind}" for kind in _ROUGES] if metric == "rouge" else [metric]
    result["scrolls_score"] = result["rouge/geometric_mean" if metric == "rouge" else metric]
    return result | {"display_keys": shown, "display": [result[key] for key in shown]}


def benchmark(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the whole benchmark's official dictionary from task -> what `evaluate` returned.

    Its "scrolls_score" is the mean over the seven tasks.

    Raises:
        ValueError: the tasks are not exactly the seven.

    Examples:
        >>> one = {"scrolls_score": 50.0, "display": [50.0], "display_keys": ["f1"]}
        >>> benchmark(dict.fromkeys(METRICS, one))["scrolls_score"]
        50.0
    """
    if set(results) != set(METRICS):
        raise ValueError(f"results must hold the seven tasks {', '.join(METRICS)}, got {', '.join(sorted(results))}")
    kept = ("scrolls_score", "display", "display_keys")
    tasks = {task: {key: results[task][key] for key in kept} for task in METRICS}
    return tasks | {"scrolls_score": sum(task["scrolls_score"] for task in tasks.values()) / len(tasks)}


def normalized(text: str) -> str:
    """Lower the text, drop ASCII punctuation (words join across it), then the articles, then surplus blanks."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

if TYPE_CHECKING:
    Pairs = Sequence[tuple[str, Sequence[str]]]


def _f1(prediction: str, reference: str) -> float:
    words, wanted = normalized(prediction).split(), normalized(reference).split()
    shared = sum((Counter(words) & Counter(wanted)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(words), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _equal(prediction: str, reference: str) -> float:
    return float(normalized(prediction) == normalized(reference))


def _best_of(name: str, score: Callable[[str, str], float]) -> Callable[[Pairs], dict[str, float | None]]:
    def mean(pairs: Pairs) -> dict[str, float | None]:
        best = [max(score(prediction, reference) for reference in references) for prediction, references in pairs]
        return {name: 100 * sum(best) / len(best)}

    return mean


def _rouge(pairs: Pairs) -> dict[str, float | None]:
    split = _sentence_splitter()
    kinds = (*_ROUGES, "rougeLsum") if split else _ROUGES
    score = _rouge_scorer(kinds)
    best = []
    for prediction, references in pairs:
        if split:
            prediction, references = split(prediction), [split(reference) for reference in references]
        scores = [score(reference, prediction) for reference in references]
        best.append({kind: max(one[kind].fmeasure * 100 for one in scores) for kind in kinds})
    means: dict[str, float] = {kind: sum(one[kind] for one in best) / len(best) for kind in kinds}
    geometric = (means["rouge1"] * means["rouge2"] * means["rougeL"]) ** (1 / 3)
    result = {f"rouge/{kind}": means.get(kind) for kind in (*_ROUGES, "rougeLsum")}
    return {**result, "rouge/geometric_mean": geometric}


_SCORERS: dict[str, Callable[[Pairs], dict[str, float | None]]] = {
    "rouge": _rouge,
    "f1": _best_of("f1", _f1),
    "exact_match": _best_of("exact_match", _equal),
}


def _rouge_scorer(kinds: Sequence[str]) -> Callable[[str, str], dict[str, Any]]:
    try:
        from rouge_score import rouge_scorer, tokenizers
    except ModuleNotFoundError as error:
        raise missing("SCROLLS' ROUGE", "rouge-score", "eval") from error
    # A tokenizer of one's own keeps the scorer from logging, through absl, that it took the default one.
    scorer = rouge_scorer.RougeScorer(list(kinds), tokenizer=tokenizers.DefaultTokenizer(use_stemmer=False))
    score: Callable[[str, str], dict[str, Any]] = scorer.score
    return score


def _sentence_splitter() -> Callable[[str], str] | None:
    """Return what puts each sentence of a text on a line, or None where NLTK's data for it is not installed."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except (LookupError, ModuleNotFoundError):
        return None
    return lambda text: "\n".join(nltk.sent_tokenize(text))


def _metric_of(task: str) -> str:
    if task not in METRICS:
        raise ValueError(f"task must be one of {', '.join(METRICS)}, got {task!r}")
    return METRICS[task]


def _references(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    references: dict[str, list[str]] = {}
    for row in rows:
        if not isinstance(row.get("output"), str):
            raise ValueError(
                f"row {row.get('id')!r} has no output to compare with: the test split's are private, take 'validation'"
            )
        references.setdefault(row["id"], []).append(row["output"])
    if not references:
        raise ValueError("rows must hold at least one example, got none")
    return references


def _check(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    for key, text in predictions.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"predictions must map ids to texts, got {key!r}: {text!r}")
    unlike = {
        "missing": [key for key in references if key not in predictions],
        "redundant": [key for key in predictions if key not in references],
    }
    faults = [f"{len(ids)} {what} ids ({_some(ids)})" for what, ids in unlike.items() if ids]
    if faults:
        raise ValueError(
            f"predictions must have exactly the rows' {len(references)} ids, got {' and '.join(faults)}; predict every "
            "row of the split, or hand over only the rows that were predicted"
        )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:_NAMED])) + (", ..." if len(ids) > _NAMED else "")
