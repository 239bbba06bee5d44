"""The named, configured runs behind the records: what ``tokcx run NAME`` runs.

Each module holds the experiments of one topic; this package puts them together, by name.
"""

from tokcx_lib.experiments import gaussian, real_heads, sharp
from tokcx_lib.runs import Experiment

EXPERIMENTS: dict[str, Experiment] = dict(sorted((gaussian.EXPERIMENTS | real_heads.EXPERIMENTS | sharp.EXPERIMENTS).items()))
