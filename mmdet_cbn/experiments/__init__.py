"""What users of the layer do without: the paper's tables and our study, their trainings, and what measures them."""

import warnings

# mmengine's own, said again for each config that it reads.
warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
