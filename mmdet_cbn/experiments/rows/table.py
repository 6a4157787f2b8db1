"""Tables as data: the paper's, or our study's. A row is one line of a table, or one point of a figure."""

from collections.abc import Collection
from typing import Any, NamedTuple

BOX = ('bbox_mAP', 'bbox_mAP_50', 'bbox_mAP_75', 'bbox_mAP_s', 'bbox_mAP_m', 'bbox_mAP_l')


class Row(NamedTuple):
    """One row of a table, or one point of a figure."""

    name: str  #: unique in its table
    labels: tuple[str | float, ...]  #: what stands in the table's own columns; in a figure, the series and its x
    config: str  #: a file of configs/``folder``, without ``.py``
    paper: dict[str, float]  #: the paper's numbers by metric, APs in percent; of a figure, those that the text gives
    options: dict[str, Any] = {}  # noqa: RUF012  #: --cfg-options, by key
    times_images: float = 1  #: how many times the config's images per GPU
    times_rate: float = 1  #: how many times the learning rate for each image
    burn_in: float | None = None  #: part of the training, where it is not the config's
    folder: str = 'cbn'
    small: str | None = None  #: end of the name of a small version in configs/small, to train instead

    @property
    def file(self) -> str:
        """Path under configs of what is trained."""
        return f'{self.folder}/{self.config}.py' if self.small is None else f'small/r18_{self.small}.py'

    @property
    def environment(self) -> dict[str, str]:
        """What the file reads: a small version, the name of the config."""
        return {} if self.small is None else {'CBN_ROW': self.config}

    @property
    def run(self) -> str:
        """Name of the training run. Several rows may share a run."""
        return f'{self.config}+{self.name}' if self.is_changed else self.config

    @property
    def is_changed(self) -> bool:
        """Whether it is trained with more than its config."""
        return bool(self.options) or (self.times_images, self.times_rate, self.burn_in) != (1, 1, None)

    def options_for(self, config: Any) -> dict[str, Any]:
        """All --cfg-options, by key, for ``config``, the row's own or its small version. The learning rate is linear
        in the images."""
        options = dict(self.options)
        if self.times_images != 1:
            options['train_dataloader.batch_size'] = round(config.train_dataloader.batch_size * self.times_images)
        if self.times_images * self.times_rate != 1:
            rate = config.optim_wrapper.optimizer.lr * self.times_images * self.times_rate
            options['optim_wrapper.optimizer.lr'] = rate
        if self.burn_in is not None:
            options['custom_hooks.0.burn_in_epochs'] = round(config.train_cfg.max_epochs * self.burn_in)
        return options


class Table(NamedTuple):
    """A table, or a figure: then its labels are the series and x."""

    name: str  #: ``'table6-mask'``, ``'figure3'``
    title: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    gpus: int = 4  #: that its rows are trained on

    @property
    def is_ours(self) -> bool:
        """Whether it belongs to our study. The paper has no numbers for it."""
        return self.name.startswith('study')

    @property
    def is_figure(self) -> bool:
        return self.is_ours or self.name.startswith('figure')

    def is_in(self, names: Collection[str]) -> bool:
        """Whether one of the names is its number, or names our whole study."""
        return self.number in names or (self.is_ours and 'study' in names)

    @property
    def number(self) -> str:
        """The paper's number: ``'6'`` for both parts of Table 6, or ``'figure3'``."""
        return self.name if self.is_figure else self.name.removeprefix('table').partition('-')[0]
