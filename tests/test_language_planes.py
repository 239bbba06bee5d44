"""Planes of rotary positions: what they add to logits, against whole logits and drawn keys; planted faults."""

import pytest
import torch
import transformers
from test_language_loss import IDS, alone, normal, tiny

from tokcx_lib import records, runtime
from tokcx_lib.models.capture import capture
from tokcx_lib.studies.language_model import plane_experiments, planes
from tokcx_lib.studies.language_model.answering import token_losses
from tokcx_lib.studies.registry import EXPERIMENTS

THETA = planes.angles(tiny().model)  # (4,): heads of 8 dimensions
PLACES = torch.arange(40)


def seen_by_attention(x):
    return planes.turned(x, THETA, PLACES)


def test_planes_are_turned_as_the_model_turns_them():
    model = tiny().model
    x = normal(1, 4, 40, 8)
    cos, sin = model.rotary_emb(x, PLACES[None])
    expected = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0]
    assert torch.allclose(planes.turned(x, THETA, PLACES), expected, atol=1e-5)
    assert torch.allclose(planes.turned(planes.turned(x, THETA, PLACES), THETA, -PLACES), x, atol=1e-5)


def shares_of(q, k):
    return planes.shares(seen_by_attention(q), seen_by_attention(k), THETA, torch.tensor([20, 30, 39]))


def test_shares_are_those_of_logits_made_plane_by_plane():
    q, k = normal(4, 40, 8), normal(2, 40, 8, seed=1) + 1.0
    found = shares_of(q, k)
    assert torch.allclose((found.pattern + found.content).sum(-1), torch.ones(4, dtype=torch.float64))
    q, k = (seen_by_attention(each).double() for each in (q, k))
    for head in (0, 3):
        above = below = 0.0
        for row in (20, 30, 39):
            past = k[head // 2, 1 : row + 1]
            whole = past @ q[head, row]
            part = past[:, [1, 5]] @ q[head, row, [1, 5]]
            above += ((part - part.mean()) * (whole - whole.mean())).sum()
            below += (whole - whole.mean()).square().sum()
        assert (found.pattern + found.content)[head, 1] == pytest.approx((above / below).item())


def test_a_mean_makes_a_pattern_and_the_rest_content():
    q = normal(2, 40, 8)
    same = normal(1, 1, 8, seed=1).expand(1, 40, 8)
    found = shares_of(q, same)
    assert found.content.abs().max() < 1e-4
    assert torch.allclose(found.pattern.sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-4)
    faster = planes.shares(seen_by_attention(q), seen_by_attention(same), 1.05 * THETA, torch.tensor([20, 30, 39]))
    assert faster.content.abs().max() > 0.01  # planted: other angles than the model's
    rest = normal(1, 40, 8, seed=2)
    rest[:, 1:] -= rest[:, 1:].mean(1, keepdim=True)
    assert shares_of(q, rest).pattern.abs().max() < 1e-4
    # In one plane alone, all is there.
    only = torch.zeros(1, 40, 8)
    only[..., [2, 6]] = rest[..., [2, 6]]
    assert torch.allclose(shares_of(q, only).content, torch.eye(4)[2].double().expand(2, 4), atol=1e-6)


def logits(q, k):
    return q @ k.repeat_interleave(len(q) // len(k), 0).mT


def stilled(distance, q, k):
    return logits(*planes.changed(seen_by_attention(q), seen_by_attention(k), THETA, [0, 2], "still", distance))


def expected_still(distance, q, k):
    """Planes 1 and 3 as they turn, planes 0 and 2 at one distance."""
    moving, fixed = torch.tensor([1, 3, 5, 7]), torch.tensor([0, 2, 4, 6])
    turning = logits(seen_by_attention(q)[..., moving], seen_by_attention(k)[..., moving])
    at = planes.turned(q, THETA, torch.full((40,), distance))
    return turning + logits(at[..., fixed], k[..., fixed])


def test_a_still_plane_sees_every_key_at_one_distance_and_one_that_is_gone_none():
    q, k = normal(4, 40, 8), normal(2, 40, 8, seed=1)
    for distance in (0.0, 5.0):
        assert torch.allclose(stilled(distance, q, k), expected_still(distance, q, k), atol=1e-4)
        assert not torch.allclose(stilled(distance, q, k), expected_still(-3.0, q, k), atol=1e-2)
    turned_q, turned_k = seen_by_attention(q), seen_by_attention(k)
    left = torch.tensor([1, 3, 5, 7])
    gone = logits(*planes.changed(turned_q, turned_k, THETA, [0, 2], "gone"))
    assert torch.allclose(gone, logits(turned_q[..., left], turned_k[..., left]), atol=1e-5)


def test_in_the_model_no_plane_changed_changes_nothing_and_slow_ones_change_little():
    model = tiny(rope_parameters={"rope_type": "default", "rope_theta": 1e12})
    theta = planes.angles(model.model)
    own = token_losses(model, IDS)
    moved = [
        (token_losses(model, IDS, planes.without_turning(theta, [m], "still")) - own).abs().max() for m in range(4)
    ]
    assert moved[3] < 1e-4 < 0.01 < moved[0]  # 1e-9 radians a token do not turn in a window of 40
    assert (token_losses(model, IDS, planes.without_turning(theta, [3], "gone")) - own).abs().max() > 0.01


def test_errors_of_outputs_are_those_of_whole_attention():
    model, found = tiny().model, []
    with capture(model, found.append), torch.no_grad():
        model(IDS[None, :40])
    rows = torch.tensor([25, 39])
    errors = planes.output_errors(found[1], THETA, [0, 1], "gone", rows)
    q, k, v = (getattr(found[1], name)[0] for name in "qkv")
    answer = planes.without_turning(THETA, [0, 1], "gone")(1, q, k, v)
    for head in range(4):
        squares = []
        for row in rows.tolist():
            past = v[head // 2, 1 : row + 1]
            spread = past.var(0, correction=0).sum()
            squares.append((answer[head, row] - found[1].output[0, row, head]).square().sum() / spread)
        assert errors[head].item() == pytest.approx(torch.stack(squares).mean().sqrt().item(), rel=1e-3)


def test_what_has_no_planes_is_refused():
    with pytest.raises(ValueError, match="^planes: expected integers from 0 to 3, got 4.* to 4"):
        planes.without_turning(THETA, [4], "still")(0, *(normal(2, 40, 8) for _ in range(3)))
    with pytest.raises(ValueError, match="^change: expected one of still, gone, got 'slow'"):
        planes.without_turning(THETA, [1], "slow")
    gpt = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=99))
    with pytest.raises(ValueError, match="^model: expected heads that turn all of their 8 dimensions, got 0"):
        planes.angles(gpt)


def test_groups_are_all_planes_by_how_far_they_turn():
    theta = torch.tensor([1.0, 0.1, 0.05, 0.01, 0.001, 0.0004])
    found = plane_experiments.groups(theta, 1000)
    assert found == {"fast": [0, 1], "middle": [2, 3], "slow": [], "standing": [4, 5]}
    assert plane_experiments.groups(theta, 900)["standing"] == [4, 5]
    assert plane_experiments.groups(theta, 1001)["slow"] == [4]


@pytest.mark.parametrize("name", ["language_model_planes", "language_model_still"])
def test_a_unit_can_be_run_alone(name, monkeypatch):
    model = tiny(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    ids = torch.randint(3, 99, (2, 41), generator=runtime.stream(5))
    monkeypatch.setattr(plane_experiments, "opened", lambda *rest: (model, ids, {}))
    experiment = EXPERIMENTS[name]
    plan = experiment.plan(
        {**experiment.config("quick"), "context": 40, "late": 20, "replicates": 2}, torch.device("cpu")
    )
    part = alone(experiment, plan, plan.units[0])
    assert part.table.drop(columns=["group", "name", "change"], errors="ignore").notna().all(axis=None)
    if name == "language_model_planes":
        assert len(part.table) == 2 * 4 * 4
        assert (part.table.groupby(["layer", "head"])[["pattern", "content"]].sum().sum(axis=1) - 1).abs().max() < 1e-6
        found = plan.summary([part.arrays] * 2)["planes"]
        assert sum(found["pattern"]) + sum(found["content"]) == pytest.approx(1, abs=1e-2)


def test_the_record_has_all_heads_and_shares_that_add_up():
    table, meta = records.load("language_model_planes")
    heads = table.groupby(["replicate", "layer", "head"])[["pattern", "content"]].sum().sum(axis=1)
    assert len(heads) == 270 * meta["config"]["replicates"] and (heads - 1).abs().max() < 1e-4
    theta = torch.tensor(meta["theta"])
    assert plane_experiments.groups(theta, meta["config"]["context"]) == meta["groups"]
    single, mean = meta["planes"], table.groupby("group")[["pattern", "content"]].mean()
    for group, numbers in meta["groups"].items():
        for kind in ("pattern", "content"):
            assert sum(single[kind][m] for m in numbers) == pytest.approx(mean.loc[group, kind], abs=1e-3)


def test_planes_that_stand_may_stand_still_and_are_not_to_be_missed():
    table = records.load("language_model_still").table
    nats = table.groupby(["change", "name"])["excess"].mean()
    assert nats["still", "standing"] < 0.2 * nats["still", "fast"] and nats["gone", "standing"] > nats["gone", "fast"]
