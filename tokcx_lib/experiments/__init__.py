"""The named, configured runs behind the records: what ``tokcx run NAME`` runs.

Each module holds the experiments of one topic; this package puts them together, by name.
"""

from tokcx_lib.experiments import exact, gaussian, real_heads
from tokcx_lib.runs import Experiment

EXPERIMENTS: dict[str, Experiment] = dict(
    sorted((exact.EXPERIMENTS | gaussian.EXPERIMENTS | real_heads.EXPERIMENTS).items())
)
