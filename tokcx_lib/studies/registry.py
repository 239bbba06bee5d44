"""The named, configured runs behind the records: what ``tokcx run NAME`` runs.

Each room of `studies` holds the experiments of one subject; this module puts them together, by name.
"""

from tokcx_lib.studies import bounded, coverage, exact, gaussian
from tokcx_lib.studies.causal_rotary import experiments as causal_rotary
from tokcx_lib.studies.depth import experiments as depth
from tokcx_lib.studies.downstream import experiments as downstream
from tokcx_lib.studies.language_model import head_experiments as language_model_heads
from tokcx_lib.studies.language_model import loss_experiments as language_model_loss
from tokcx_lib.studies.language_model import plane_experiments as language_model_planes
from tokcx_lib.studies.real_heads import experiments as real_heads
from tokcx_lib.studies.real_heads import token_experiments as real_tokens
from tokcx_lib.studies.runs import Experiment
from tokcx_lib.studies.scaling import experiments as scaling
from tokcx_lib.studies.sharp import experiments as sharp
from tokcx_lib.studies.sparse import experiments as sparse

_TOPICS = (
    bounded,
    causal_rotary,
    coverage,
    depth,
    downstream,
    exact,
    gaussian,
    language_model_heads,
    language_model_loss,
    language_model_planes,
    real_heads,
    real_tokens,
    scaling,
    sharp,
    sparse,
)

EXPERIMENTS: dict[str, Experiment] = {
    name: topic.EXPERIMENTS[name] for topic in _TOPICS for name in sorted(topic.EXPERIMENTS)
}
