"""Tables and plots of what was found about the statistics of a training (fidelity.py, gradients.py), from CSV files."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..markdown import table
from .fidelity import NOISE, Error
from .gradients import Ratio

Averages = list[dict[str, Any]]

STATISTICS, LAYERS, GRADIENTS = 'statistics.csv', 'layers.csv', 'gradients.csv'
_ERRORS = {'mean_error': 'mean, in sigma', 'var_error': 'variance, relative'}
_RATIOS = {'mean': 'mean', 'second_moment': 'second moment'}


def averages(rows: Iterable[Any], by: Sequence[str], of: Iterable[str]) -> Averages:
    """Means of the fields ``of`` over all rows (named tuples or dicts) that agree in the fields ``by``."""
    groups = defaultdict(list)
    for row in rows:
        row = row if isinstance(row, dict) else row._asdict()
        groups[tuple(row[field] for field in by)].append(row)
    return [
        {**dict(zip(by, key, strict=True)), **{field: mean(row[field] for row in group) for field in of}}
        for key, group in groups.items()
    ]


def write_results(errors: Iterable[Error], ratios: Iterable[Ratio], out: Path) -> None:
    """Write means over the layers, by iteration, and over the iterations, by layer; nothing looked at, no file."""
    errors = list(errors)
    files = {
        STATISTICS: averages(errors, ('iteration', 'tau', 'compensation'), _ERRORS),
        LAYERS: averages(errors, ('layer', 'tau', 'compensation'), _ERRORS),
        GRADIENTS: averages(ratios, ('iteration', 'before'), _RATIOS),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        if rows:
            with open(out / name, 'w', newline='', encoding='utf-8') as file:
                writer = csv.DictWriter(file, rows[0], lineterminator='\n')
                writer.writeheader()
                for row in rows:
                    writer.writerow({k: f'{v:.4g}' if isinstance(v, float) else v for k, v in row.items()})


def draw(folder: Path) -> str:
    """Make table and plots of the CSV files in a folder, beside them; returns the table.

    Raises:
        FileNotFoundError: There are none of statistics; those of gradients may be missing.
    """
    statistics = _read(folder / STATISTICS)
    text = to_markdown(statistics)
    (folder / 'statistics.md').write_text(text, encoding='utf-8')
    plot_errors(statistics).savefig(folder / 'statistics.png', dpi=100)
    if (folder / GRADIENTS).is_file():
        plot_ratios(_read(folder / GRADIENTS)).savefig(folder / 'gradients.png', dpi=100)
    return text


def _read(file: Path) -> Averages:
    whole, words = {'iteration', 'tau', 'before'}, {'compensation'}
    with open(file, newline='', encoding='utf-8') as stream:
        return [
            {k: v if k in words else int(v) if k in whole else float(v) for k, v in row.items()}
            for row in csv.DictReader(stream)
        ]


def _taus_of(statistics: Averages) -> list[int]:
    """The first, the middle and the last."""
    last = max(row['tau'] for row in statistics)
    return sorted({1, max(last // 2, 1), last})


def to_markdown(statistics: Averages) -> str:
    """Means over layers and iterations, a row for each compensation."""
    taus = _taus_of(statistics)
    means = {(row['compensation'], row['tau']): row for row in averages(statistics, ('compensation', 'tau'), _ERRORS)}
    heads = [f'{name}, tau = {tau}' for name in _ERRORS.values() for tau in taus]
    rows = [
        [compensation, *(f'{means[compensation, tau][error]:.4f}' for error in _ERRORS for tau in taus)]
        for compensation in dict.fromkeys(row['compensation'] for row in statistics)
    ]
    return f'{table(["compensation", *heads], rows)}\n'


def plot_errors(statistics: Averages) -> Figure:
    """Error of mean and variance over tau, and over training progress at the middle tau, on log axes."""
    tau = _taus_of(statistics)[len(_taus_of(statistics)) // 2]
    figure = Figure(figsize=(10, 7), layout='constrained')
    panels: Any = figure.subplots(2, 2, sharey='row')
    for (error, name), axes in zip(_ERRORS.items(), panels, strict=True):
        for number, compensation in enumerate(dict.fromkeys(row['compensation'] for row in statistics)):
            rows = [row for row in statistics if row['compensation'] == compensation]
            # The later are the thinner, for some coincide.
            width = max(5 - number, 1)
            style: Any = dict(color='black', linestyle='--') if compensation == NOISE else dict(linewidth=width)
            _line(axes[0], averages(rows, ['tau'], [error]), label=compensation, **style)
            _line(axes[1], [r for r in averages(rows, ['iteration', 'tau'], [error]) if r['tau'] == tau], **style)
        axes[0].set(yscale='log', ylabel=f'error of the {name}')
    panels[0][0].set_title('over tau, mean over the training', fontsize='medium')
    panels[0][1].set_title(f'over the training, at tau = {tau}', fontsize='medium')
    panels[1][0].set_xlabel('tau: updates of the weights since then')
    panels[1][1].set_xlabel('iterations')
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize='small')
    return figure


def plot_ratios(ratios: Averages) -> Figure:
    """The ratios of Figure 6 over the training."""
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    for field, name in _RATIOS.items():
        for before in sorted({row['before'] for row in ratios}):
            rows = averages([row for row in ratios if row['before'] == before], ['iteration'], [field])
            _line(axes, rows, label=f'{name}, r = l - {before}', marker='.', linestyle='-' if field == 'mean' else '--')
    axes.axhline(1, color='black', linewidth=0.8)
    axes.set(xlabel='iterations', ylabel='||g(r)|| / ||g(l)||', ylim=(0, None))
    axes.legend(fontsize='small')
    return figure


def _line(axes: Axes, rows: Averages, **style: Any) -> None:
    """The last field of the rows over their first."""
    rows = sorted(rows, key=lambda row: next(iter(row.values())))
    axes.plot([next(iter(row.values())) for row in rows], [list(row.values())[-1] for row in rows], **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
