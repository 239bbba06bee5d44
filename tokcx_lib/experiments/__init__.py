"""The named, configured runs behind the records: what ``tokcx run NAME`` runs.

Each module holds the experiments of one topic; this package puts them together, by name.
"""

from tokcx_lib.experiments import bounded, coverage, depth, downstream, exact, gaussian, real_heads, real_tokens, sharp, sparse
from tokcx_lib.runs import Experiment

_TOPICS = (bounded, coverage, depth, downstream, exact, gaussian, real_heads, real_tokens, sharp, sparse)

EXPERIMENTS: dict[str, Experiment] = {
    name: topic.EXPERIMENTS[name] for topic in _TOPICS for name in sorted(topic.EXPERIMENTS)
}
