"""Our own studies as data: tables like the paper's, of trainings for two CPU cores; and hooks that only they need."""

from .classification import CLASSIFICATION, CLASSIFICATION_RATES
from .fine_tuning import FINE_TUNING, FINE_TUNING_RATES
from .small_batches import SMALL_BATCHES

STUDY = (*SMALL_BATCHES, FINE_TUNING, FINE_TUNING_RATES, CLASSIFICATION, CLASSIFICATION_RATES)
