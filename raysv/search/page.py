"""A study as one page that a person reads: figures, tables, and what they say in words."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from matplotlib.figure import Figure
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from raysv.search.figures import (
    Curve,
    Point,
    det_figure,
    importance_bars,
    interaction,
    learning_curves,
    parallel_coordinates,
    pareto_front,
    read_det,
    slices,
)
from raysv.search.ranges import Range
from raysv.search.records import TrialRecord
from raysv.search.results import METRIC, metrics_by_epoch
from raysv.search.study import Study, started
from raysv.search.wording import duration, short_names, show_value

REPORT_FILE = "report.html"
NARROW = 6.0  # inches; a figure of less is not stretched over the whole page
FEWEST_FOR_IMPORTANCE = 8  # trials; of fewer a forest learns nothing
PAIRS_OF_INTEREST = (("loss.margin", "loss.scale"), ("loss.temperature", "augment.strength"))
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2630; background: #f6f7f9; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
.lead { font-size: 1.08rem; background: #fff; border-left: 4px solid #0072b2; padding: .9rem 1.1rem; margin: 1.2rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.2rem 0; }
.card { background: #fff; border-radius: .5rem; padding: .7rem .9rem; box-shadow: 0 1px 2px #0001; }
.card b { display: block; font-size: 1.35rem; font-weight: 600; } .card span { color: #5b6773; font-size: .85rem; }
figure { background: #fff; border-radius: .5rem; margin: .75rem 0; padding: .75rem; box-shadow: 0 1px 2px #0001; }
figure svg { width: 100%; height: auto; display: block; }
figure.narrow { max-width: 30rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: .75rem; }
.scroll { overflow-x: auto; background: #fff; border-radius: .5rem; box-shadow: 0 1px 2px #0001; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .7rem; white-space: nowrap; } th { color: #5b6773; font-weight: 600; }
tbody tr:nth-child(odd) { background: #f6f7f9; } .note { color: #5b6773; font-size: .9rem; margin: .3rem 0; }
"""


@dataclass(frozen=True)
class Report:
    """A page, and its figures by name."""

    page: str
    figures: dict[str, Figure] = field(default_factory=dict)


def make_report(study: Study, folder: Path) -> Report:
    """What a study found, from its records alone; checkpoints that are out of reach leave gaps in the curves.

    Raises: ValueError when no trial has a result.
    """
    heard = [trial for trial in study.trials if trial.epoch]
    if not heard:
        raise ValueError(f"Study {folder.name} has no result yet: no trial has finished an epoch.")
    curves = {trial.name: _curve(trial) for trial in heard}
    figures = _figures(study, heard, curves)
    facts = _Cost.of(study, heard, curves)
    head, *rows = study.rows()
    sections = [
        _lead(study, facts),
        _cards(study, facts),
        _confirmed(study),
        _section(
            "Learning curves", figures, "learning_curves", "Grey: trials that were stopped early or stand behind."
        ),
        _section("Two objectives", figures, "front", "Joined: no trial is better in both."),
        _section("All trials", figures, "parallel_coordinates", "One line per trial; dark is low. Thick: to the end."),
        _section("One key at a time", figures, "slices", "Rings: stopped early, judged at an earlier epoch."),
        _importance_section(study, figures),
        _interactions(figures),
        _section("Detection error trade-off on the dev pairs", figures, "det", ""),
        f"<h2>Trials</h2>{_table(head, rows)}",
        f"<h2>How it was run</h2>{_table(['', ''], _environment(folder))}",
    ]
    title = html.escape(f"Study {folder.name}")
    meta = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = f"<main><h1>{title}</h1>{''.join(filter(None, sections))}</main>"
    page = f'<!doctype html><html lang="en"><head>{meta}<style>{STYLE}</style></head><body>{body}</body></html>\n'
    return Report(page, figures)


def _curve(trial: TrialRecord) -> dict[int, float]:
    return {epoch: metrics[METRIC] for epoch, metrics in metrics_by_epoch(trial.metrics).items() if METRIC in metrics}


def _figures(
    study: Study, heard: Sequence[TrialRecord], curves: Mapping[str, Mapping[int, float]]
) -> dict[str, Figure]:
    keys = list(study.space.ranges)
    names = dict(zip(keys, short_names(keys), strict=True))
    log = {names[key] for key, span in study.space.ranges.items() if span.kind == "loguniform"}
    best, paper = _best_trial(study), _paper_trial(study)
    reference = "the paper's setting" if study.space.reference() == "the paper's setting" else "nearest to the paper's"
    labels = {best.name: f"{best.name}, the best" + (f" and {reference}" if best == paper else "")} if best else {}
    if paper and paper != best:
        labels[paper.name] = f"{paper.name}, {reference}"
    by_name = {trial.name: trial for trial in heard}
    order = [*labels, *(name for name in by_name if name not in labels)]
    points = [
        Point(
            {names[key]: value for key, value in trial.values.items() if key in names},
            trial.eer,
            trial.outcome == "complete",
        )
        for trial in heard
    ]
    figures = {
        "learning_curves": learning_curves(
            [Curve(curves[name], by_name[name].outcome == "complete", labels.get(name, "")) for name in order]
        )
    }
    if keys:
        figures["parallel_coordinates"] = parallel_coordinates(points, list(names.values()))
    if numeric := [names[key] for key in keys if _is_numeric(study.space.ranges[key])]:
        figures["slices"] = slices(points, numeric, log)
    if study.front and study.space.second:
        second = study.space.second
        every, joined = (
            [(trial.eer, float(trial.metrics[second])) for trial in some if second in trial.metrics]
            for some in (study.trials, study.front)
        )
        figures["front"] = pareto_front(every, joined, [trial.name for trial in study.front], second)
    for across, up in PAIRS_OF_INTEREST:
        if across in names and up in names:
            figures[f"{names[across]}_{names[up]}"] = interaction(points, names[across], names[up], log)
    if importances := importance(study, curves):
        epoch, shares = importances
        figures[f"importance_after_epoch_{epoch}"] = importance_bars(
            {names[key]: share for key, share in shares.items()}
        )
    shown = {labels[trial.name]: Path(trial.checkpoint, "det.csv") for trial in (best, paper) if trial}
    if there := {label: read_det(file) for label, file in shown.items() if file.is_file()}:
        figures["det"] = det_figure(dict(there))
    return figures


def importance(study: Study, curves: Mapping[str, Mapping[int, float]]) -> tuple[int, dict[str, float]] | None:
    """The share of each key in the variance of EERs, and the epoch at which these are compared.

    Trials that ended at different epochs cannot be compared, so all are taken as they stood after the grace epochs,
    which every trial has.

    Returns: None where there are too few trials, fewer than two keys that all of them have, or no differences.
    Source: functional ANOVA, Hutter et al. 2014, ICML; Optuna's.
    """
    epoch = study.space.grace_epochs
    rated = [(trial, curves[trial.name][epoch]) for trial in study.trials if epoch in curves.get(trial.name, {})]
    shared = [key for key in study.space.ranges if all(key in trial.values for trial, _ in rated)]
    if len(rated) < FEWEST_FOR_IMPORTANCE or len(shared) < 2 or len({eer for _, eer in rated}) < 2:
        return None
    distributions = {key: study.space.ranges[key].distribution() for key in shared}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    compared = optuna.create_study()
    for trial, eer in rated:
        params = {key: trial.values[key] for key in shared}
        compared.add_trial(create_trial(value=eer, params=params, distributions=distributions))
    return epoch, get_param_importances(compared, evaluator=FanovaImportanceEvaluator(seed=0))


@dataclass(frozen=True)
class _Cost:
    """What a study cost.

    Attributes:
        epochs: of trials that came to their end or were stopped early, and `asked`, how many these would have had.
        worker_seconds: of the trained epochs, evaluations not counted.
    """

    epochs: int
    asked: int
    worker_seconds: float

    @classmethod
    def of(cls, study: Study, heard: Sequence[TrialRecord], curves: Mapping[str, Mapping[int, float]]) -> _Cost:
        workers, seconds = study.space.resources.workers, 0.0
        for trial in heard:
            epochs = metrics_by_epoch(trial.metrics).values()
            seconds += sum(metrics.get("speed/epoch_seconds", 0.0) for metrics in epochs)
        ended = [trial for trial in heard if trial.outcome in ("complete", "pruned")]
        return cls(sum(trial.epoch for trial in ended), len(ended) * study.space.epochs, seconds * workers)

    @property
    def saved(self) -> float:
        """The share of epochs that early stopping saved."""
        return 1 - self.epochs / self.asked if self.asked else 0.0


def _lead(study: Study, cost: _Cost) -> str:
    """The study in a paragraph; every clause follows from a number."""
    keys, ends = short_names(study.space.ranges), [trial.outcome for trial in study.trials]
    said = [f"{len(ends)} configurations were tried, searching {_listed(keys)}." if keys else "A single run."]
    if ends.count("pruned"):
        said.append(
            f"{ends.count('pruned')} of them were stopped early, which saved {100 * cost.saved:.0f} % of the epochs."
        )
    if ends.count("error"):
        said.append(f"{ends.count('error')} failed.")
    if study.best:
        tried = ", ".join(
            f"{name} {show_value(study.best.values[key])}"
            for key, name in zip(study.space.ranges, keys, strict=True)
            if key in study.best.values
        )
        said.append(f"Lowest in the search was {study.best.name} with {100 * study.best.eer:.2f} % EER ({tried}).")
    if study.confirmation:
        said.append(f"From new seeds, {study.confirmation.verdict()}")
    elif study.best:
        said.append("Nothing was trained again from other seeds: how much of that EER is luck is not known.")
    return f'<p class="lead">{html.escape(" ".join(said))}</p>'


def _cards(study: Study, cost: _Cost) -> str:
    best = study.best
    shown = {
        "lowest EER in the search": f"{100 * best.eer:.2f} %" if best else "–",
        "trials": str(len(study.trials)),
        "epochs trained": f"{cost.epochs} of {cost.asked}",
        "saved by early stopping": f"{100 * cost.saved:.0f} %",
        "worker time in training": duration(cost.worker_seconds),
    }
    if study.confirmation:
        shown = {"confirmed mean EER": f"{100 * study.confirmation.winner.estimate.mean:.2f} %"} | shown
        shown |= {"epochs of confirmation": str(sum(run.epoch for run in study.confirming))}
    cards = (f'<div class="card"><b>{html.escape(value)}</b><span>{key}</span></div>' for key, value in shown.items())
    return f'<div class="cards">{"".join(cards)}</div>'


def _confirmed(study: Study) -> str:
    if study.confirmation is None:
        return ""
    head, *rows = study.confirmed_rows()
    seeds, speakers = len(study.confirmation.seeds), study.confirmation.speakers
    note = (
        f"{seeds} seeds that the search has not seen; intervals over seeds and the {speakers} dev speakers. "
        "The first is first for having the lowest mean, which flatters it a little."
    )
    return f'<h2>Confirmed from new seeds</h2>{_table(head, rows)}<p class="note">{note}</p>'


def _section(title: str, figures: Mapping[str, Figure], name: str, note: str) -> str:
    if name not in figures:
        return ""
    told = f'<p class="note">{note}</p>' if note else ""
    narrow = ' class="narrow"' if figures[name].get_figwidth() < NARROW else ""
    return f"<h2>{title}</h2><figure{narrow}>{svg(figures[name])}</figure>{told}"


def _importance_section(study: Study, figures: Mapping[str, Figure]) -> str:
    name = next((name for name in figures if name.startswith("importance")), "")
    epoch = name.rpartition("_")[2]
    note = f"Functional ANOVA over all trials as they stood after epoch {epoch}."
    if conditional := [key for key, span in study.space.ranges.items() if span.when]:
        note += f" Left out, because not all trials have them: {', '.join(short_names(conditional))}."
    return _section("What mattered", figures, name, note)


def _interactions(figures: Mapping[str, Figure]) -> str:
    shown = [
        f"<figure>{svg(figures[name])}</figure>" for name in ("margin_scale", "temperature_strength") if name in figures
    ]
    return f'<h2>Interactions</h2><div class="pair">{"".join(shown)}</div>' if shown else ""


def _environment(folder: Path) -> list[list[str]]:
    facts = started(folder)
    tags = {key.removeprefix("raysv."): value for key, value in facts.get("tags", {}).items()}
    return [[key, str(value)] for key, value in sorted(tags.items())]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{cells}</tbody></table></div>'


def svg(figure: Figure) -> str:
    """A figure as an element of a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _best_trial(study: Study) -> TrialRecord | None:
    """The trial that was confirmed, or where nothing was the best one of the search."""
    if study.confirmation is None:
        return study.best
    return next((trial for trial in study.trials if trial.name == study.confirmation.winner.name), None)


def _paper_trial(study: Study) -> TrialRecord | None:
    point = study.space.paper_point()
    return next((trial for trial in study.trials if trial.values == point and trial.epoch), None)


def _is_numeric(span: Range) -> bool:
    return all(isinstance(value, (int, float)) for value in span.values)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
