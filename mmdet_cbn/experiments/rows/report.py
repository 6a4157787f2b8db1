"""Our runs beside the paper's numbers, as Markdown, CSV and plots."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..markdown import table as markdown_table
from .logs import Entry, Run, collect, store_runs
from .table import Row, Table

_FEW_LINES = 7  # in a plot


def summarize(runs: list[Run], metric: str) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation (None for a single trial) of a metric; None if no trial has it."""
    values = [run.metrics[metric] for run in runs if metric in run.metrics]
    if not values:
        return None
    return mean(values), stdev(values) if len(values) > 1 else None


def markdown(table: Table, entries: Mapping[str, list[Entry]], trials: int = 1, links: str | None = None) -> str:
    """A table in Markdown: the paper's numbers, ours, their difference, and a list of missing trials.

    Args:
        table: A table or figure of the paper, or of our study, which has our numbers only.
        entries: Our trials by the name of the row.
        trials: How many trials a row should have.
        links: Path from the text to configs/cbn with a slash at its end, to link the configs with; None for no links.
    """
    if table.is_ours:
        return _markdown_of_study(table, entries)
    heads = [*table.labels, '', *(_short(metric) for metric in table.metrics), 'config']
    body: list[list[Any]] = []
    notes: list[str] = []
    missing = []
    for row in table.rows:
        config = row.config if links is None else f'[{row.config}]({links}{row.config}.py)'
        if row.is_changed:
            config += f', {_options_in_words(row)}'
        paper = [f'{row.paper[metric]:.1f}' if metric in row.paper else '' for metric in table.metrics]
        body.append([*row.labels, 'paper' if row.paper else 'paper: no number', *paper, config])
        finished = 0
        for entry in entries.get(row.name, []):
            if not entry.finished:
                continue
            results = [summarize(entry.finished, metric) for metric in table.metrics]
            who = f'ours, {_trials(entry.finished)}'
            if entry.differences:
                note = _note(entry)
                notes += [note] * (note not in notes)
                who += f', not as in the paper ({notes.index(note) + 1})'
            cells = ['-' if result is None else _with_deviation(*result) for result in results]
            body.append([*[''] * len(row.labels), who, *cells, ''])
            if not entry.differences:
                finished = len(entry.finished)
                gaps = [
                    '' if result is None or metric not in row.paper else f'{result[0] - row.paper[metric]:+.1f}'
                    for metric, result in zip(table.metrics, results, strict=True)
                ]
                if any(gaps):
                    body.append([*[''] * len(row.labels), 'difference', *gaps, ''])
        if finished < trials:
            missing.append(f'{row.name} ({_progress(entries.get(row.name, []), finished, trials)})')
    lines = _titled(table, heads, body)
    if notes:
        lines += ['', *(f'({number}) {note}' for number, note in enumerate(notes, 1))]
    lines += _nothing_detected(table, entries)
    if len(missing) == len(table.rows) and not entries:
        lines += ['', 'We have trained none of these.']
    elif missing:
        lines += ['', f'Not trained by us, or not as in the paper: {", ".join(missing)}.']
    return '\n'.join(lines) + '\n'


def _markdown_of_study(table: Table, entries: Mapping[str, list[Entry]]) -> str:
    heads = [*table.labels, *(_short(metric) for metric in table.metrics), 'trials']
    body: list[list[Any]] = []
    for row in table.rows:
        if runs := _as_planned(entries.get(row.name, [])):
            results = [summarize(runs, metric) for metric in table.metrics]
            cells = ['-' if result is None else _with_deviation(*result) for result in results]
            body.append([*row.labels, *cells, len(runs)])
    lines = [*_titled(table, heads, body), *_nothing_detected(table, entries), *_not_trained(table, entries)]
    return '\n'.join(lines) + '\n'


def overview(table: Table, entries: Mapping[str, list[Entry]], trials: int) -> str:
    """A table of our study by its first metric alone, as Markdown: methods as rows, and the other label as columns.

    Args:
        table: A table of our study.
        entries: Our trials by the name of the row.
        trials: How many trials a row should have. Where it has others, their number follows.
    """
    method, other = table.labels
    xs = sorted({float(row.labels[1]) for row in table.rows})
    found: dict[Any, dict[float, str]] = defaultdict(dict)
    for row in table.rows:
        runs = _as_planned(entries.get(row.name, []))
        if result := summarize(runs, table.metrics[0]):
            number = '' if len(runs) == trials else f' ({_trials(runs)})'
            found[row.labels[0]][float(row.labels[1])] = _with_deviation(*result) + number
    body = [[name, *(cells.get(x, '') for x in xs)] for name, cells in found.items()]
    what = f'{_short(table.metrics[0])} (%), mean ± deviation of {trials} trials. Columns: {other}.'
    if any(len(cells) < len(xs) for cells in found.values()):
        what += ' An empty cell was not trained.'
    lines = [f'### {table.title}', '', what[0].upper() + what[1:], '']
    lines += [markdown_table([method, *(f'{x:g}' for x in xs)], body, rule=' --- ')]
    return '\n'.join([*lines, *_nothing_detected(table, entries), *_not_trained(table, entries)]) + '\n'


def _as_planned(entries: list[Entry]) -> list[Run]:
    """The finished trials with the row's own settings."""
    return [run for entry in entries if not entry.differences for run in entry.finished]


def _not_trained(table: Table, entries: Mapping[str, list[Entry]]) -> list[str]:
    """Names the rows of our study without a trial, which the tables leave out."""
    missing = [row for row in table.rows if not _as_planned(entries.get(row.name, []))]
    names = [f'{method} ({table.labels[1]}: {x:g})' for method, x in (row.labels for row in missing)]
    return ['', f'Planned, but not trained yet: {"; ".join(names)}.'] if names else []


def _nothing_detected(table: Table, entries: Mapping[str, list[Entry]]) -> list[str]:
    """Names the rows with trials that detected nothing."""
    found = []
    for row in table.rows:
        of_row = entries.get(row.name, [])
        finished = _as_planned(of_row) if table.is_ours else [run for entry in of_row for run in entry.finished]
        if number := sum(run.nothing_detected for run in finished):
            found.append(f'{row.name} ({number} of {_trials(finished)})')
    return ['', f'Nothing was detected, which counts as AP 0: {", ".join(found)}.'] if found else []


def _titled(table: Table, heads: list[str], rows: list[list[Any]]) -> list[str]:
    return [f'### {table.title}', '', markdown_table(heads, rows, rule=' --- ')]


def _trials(runs: list[Run]) -> str:
    return f'{len(runs)} trial{"s" * (len(runs) > 1)}'


def _short(metric: str) -> str:
    """``box AP50`` for ``bbox_mAP_50``. Other names stay as they are."""
    return metric.replace('bbox_mAP', 'box AP').replace('segm_mAP', 'mask AP').replace('top1', 'top-1').replace('_', '')


def _with_deviation(value: float, deviation: float | None) -> str:
    return f'{value:.1f}' if deviation is None else f'{value:.1f} ± {deviation:.1f}'


def _options_in_words(row: Row) -> str:
    words = {f'{key.rpartition(".")[2]}={value}' for key, value in row.options.items()}
    if row.times_images != 1:
        words.add(f'{row.times_images:g} times the images per GPU and the learning rate')
    if row.burn_in is not None:
        words.add(f'burn-in for {row.burn_in:.0%} of the epochs')
    return ', '.join(sorted(words))


def _note(entry: Entry, shown: int = 4) -> str:
    rest = len(entry.differences) - shown
    text = f"Other settings, the paper's in brackets: {'; '.join(entry.differences[:shown])}"
    return f'{text}; and {rest} more.' if rest > 0 else f'{text}.'


def _progress(entries: list[Entry], finished: int, trials: int) -> str:
    begun = [run for entry in entries if not entry.differences for run in entry.runs if not run.metrics]
    states = [f'epoch {max(run.curve, default=0)} of {run.epochs}' for run in begun]
    return '; '.join([f'{finished} of {trials}', *states])


def write_csv(file: Path, table: Table, entries: Mapping[str, list[Entry]]) -> None:
    """The table as CSV, with one line per row, metric and setting."""
    with open(file, 'w', newline='') as stream:
        writer = csv.writer(stream)
        writer.writerow(
            [
                'table',
                'row',
                'config',
                'metric',
                'paper',
                'ours',
                'deviation',
                'trials',
                'difference',
                'as in the paper',
                'nothing detected',
            ]
        )
        for row in table.rows:
            for entry in entries.get(row.name) or [Entry([], ())]:
                for metric in table.metrics:
                    result = summarize(entry.finished, metric)
                    paper = row.paper.get(metric)
                    comparable = result is not None and paper is not None and not entry.differences
                    writer.writerow(
                        [
                            table.name,
                            row.name,
                            row.config,
                            metric,
                            paper,
                            result and round(result[0], 3),
                            result and result[1] and round(result[1], 3),
                            len(entry.finished),
                            round(result[0] - paper, 3) if comparable else None,  # type: ignore[index, operator]
                            not entry.differences if entry.runs else None,
                            sum(run.nothing_detected for run in entry.finished),
                        ]
                    )


def plot_curves(table: Table, entries: Mapping[str, list[Entry]]) -> Figure | None:
    """Plot AP over epochs, one line per row: the mean and range over trials. None if there is no run."""
    metric = table.metrics[0]
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for row in table.rows:
        for entry in entries.get(row.name, []):
            values = defaultdict(list)
            runs = [run for run in entry.runs if any(metric in metrics for metrics in run.curve.values())]
            for run in runs:
                for epoch, metrics in run.curve.items():
                    if metric in metrics:
                        values[epoch].append(metrics[metric])
            if not values:
                continue
            epochs = sorted(values)
            name = ', '.join(map(str, row.labels))
            label = f'{name}: {_trials(runs)}{", not as in the paper" * bool(entry.differences)}'
            (line,) = axes.plot(
                epochs, [mean(values[epoch]) for epoch in epochs], marker='o', markersize=3, label=label
            )
            low, high = ([pick(values[epoch]) for epoch in epochs] for pick in (min, max))
            axes.fill_between(epochs, low, high, alpha=0.2, color=line.get_color())
            if metric in row.paper and not entry.differences:
                axes.axhline(row.paper[metric], linestyle=':', color=line.get_color(), label=f'{name}: the paper')
    if not axes.lines:
        return None
    axes.set(title=table.title, xlabel='epochs', ylabel=f'{_short(metric)} (%)')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    return figure


def plot_figure(table: Table, entries: Mapping[str, list[Entry]]) -> Figure | None:
    """Plot AP over k or burn-in: mean and deviation over trials, one line per method, and the points of the paper.

    Rows that were trained with other settings than the paper's have a line of their own. In a table of many methods
    those with a single point are left out: their lines would be too many to tell apart. None without any finished run.
    """
    metric = table.metrics[0]
    figure = Figure(figsize=(7, 5), layout='constrained')
    axes = figure.subplots()
    points_of = Counter(row.labels[0] for row in table.rows)
    for method, number_of_points in points_of.items():
        if table.is_ours and len(points_of) > _FEW_LINES and number_of_points == 1:
            continue
        lines: dict[str, list[tuple[Any, float, float]]] = defaultdict(list)
        for row in table.rows:
            if row.labels[0] != method:
                continue
            if metric in row.paper:
                axes.plot(row.labels[1], row.paper[metric], '*', color='black', markersize=10, fillstyle='none')
            for entry in entries.get(row.name, []):
                if entry.differences and table.is_ours:
                    break
                if result := summarize(entry.finished, metric):
                    name = f'{method}, not as in the paper' if entry.differences else str(method)
                    lines[name].append((row.labels[1], result[0], result[1] or 0))
                    break
        for name, points in lines.items():
            xs, means, deviations = zip(*sorted(points), strict=True)
            number = len(axes.containers)  # matplotlib has ten colours
            style: Any = dict(marker='os'[number // 10 % 2], linestyle='-' if number < 10 else '--')
            axes.errorbar(xs, means, deviations, capsize=3, label=name, **style)
    if not axes.containers:
        return None
    if not table.is_ours:
        axes.plot([], [], '*', color='black', markersize=10, fillstyle='none', label='paper, where it gives the number')
    axes.set(title=table.title, xlabel=table.labels[1], ylabel=f'{_short(metric)} (%)')
    ticks = sorted({float(row.labels[1]) for row in table.rows})
    if ticks[0] > 0:
        axes.set_xscale('log', base=2)
    axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.title.set_fontsize('medium')
    axes.grid(alpha=0.3)
    if len(axes.containers) > 8:  # they would cover the lines
        figure.legend(fontsize='small', loc='outside lower center', ncols=2)
    else:
        axes.legend(fontsize='small')
    return figure


def write_report(runs: list[Run], out: Path, configs: Path, trials: int, tables: Iterable[Table]) -> list[Path]:
    """Write Markdown, CSV and plots of the tables, and the runs. Table 8 is left to tools/benchmark.py.

    Args:
        runs: What was trained.
        out: Folder to write to.
        configs: The folder of the configs.
        trials: How many trials a row should have.
        tables: The tables.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    if runs:
        store_runs(runs, out / 'runs.json')
        written.append(out / 'runs.json')
    for table in tables:
        if table.number == '8':
            continue
        entries = collect(table, runs, configs)
        (out / f'{table.name}.md').write_text(markdown(table, entries, trials), encoding='utf-8')
        write_csv(out / f'{table.name}.csv', table, entries)
        written += [out / f'{table.name}.md', out / f'{table.name}.csv']
        figures = {
            'epochs': None if table.is_ours else plot_curves(table, entries),
            'results': plot_figure(table, entries) if table.is_figure else None,
        }
        for kind, figure in figures.items():
            if figure is not None:
                figure.savefig(out / f'{table.name}-{kind}.png', dpi=120)
                written.append(out / f'{table.name}-{kind}.png')
    return written
