"""The probe in context against a plain account of each query, and as a whole: its table, resumed, in part, on ranks."""

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from scipy import stats
from tokenizers import Tokenizer, models, processors

from tests.test_capture import small
from tokcx_lib import runtime
from tokcx_lib.models import loading
from tokcx_lib.models.capture import Attention, capture
from tokcx_lib.probe import queries
from tokcx_lib.probe.context import discard_windows, probe_in_context
from tokcx_lib.probe.policies import POLICIES
from tokcx_lib.probe.predictions import drawn_errors
from tokcx_lib.probe.question import question

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    with runtime.one_thread():
        yield


# ------------------------------------------------------------ one layer in one window, query by query


def plain_query(attention: Attention, head: int, row: int, draws: np.ndarray, lengths: list[int]) -> dict[str, float]:
    """All that is noted of one query, in float64, from what the attention reads and no more."""
    group = head * attention.k.shape[1] // attention.q.shape[1]
    q = attention.q[0, head, row].double().numpy()
    k, v = (part[0, group].double().numpy() for part in (attention.k, attention.v))
    pick = lambda part: part[0, head if part.shape[1] > 1 else 0, row].numpy()  # noqa: E731
    added, mask = np.zeros(len(k)), attention.mask
    if mask is None:
        sees = [j <= row or not attention.causal for j in range(len(k))]
    elif mask.dtype == torch.bool:
        sees = list(pick(mask))
    else:
        added, sees = added + pick(mask), [x > -1e30 for x in pick(mask)]
    if attention.position is not None:
        added = added + pick(attention.position)
    keys = [j for j in range(len(k)) if sees[j]]
    logit = {}
    for j in keys:
        logit[j] = float(q @ k[j])
        if attention.cap is not None:
            logit[j] = attention.cap * math.tanh(logit[j] / attention.cap)
        logit[j] += added[j]
    top = max(logit.values())
    mass = {j: math.exp(logit[j] - top) for j in keys}
    sink = 0.0 if attention.sinks is None else math.exp(attention.sinks[head].item() - top)

    def output(read):
        return sum(mass[j] * v[j] for j in read) / (sum(mass[j] for j in read) + sink)

    rest = [j for j in keys if j > 0]
    logits, values = np.array([logit[j] for j in rest]), v[rest]
    covariance = np.cov(values.T, bias=True).reshape(v.shape[1], v.shape[1])
    spread = covariance.trace()
    load = logits.std()
    if attention.cap is None and not added.any():
        form = math.sqrt(q @ np.cov(k[rest].T, bias=True) @ q)
        assert form == pytest.approx(load, rel=1e-6, abs=1e-9)  # a bilinear head's load is the deviation of its logits
        load = form
    weight = {j: mass[j] / (sum(mass.values()) + sink) for j in keys}
    together = np.mean((logits - logits.mean())[:, None] * (values - values.mean(0)), 0)
    found = {
        "keys": len(keys),
        "load": load,
        "load_with_first": np.std(list(logit.values())),
        "along": together @ together / (logits.var() * spread) if load > 0 and spread > 0 else 0.0,
        "effective": sum(weight.values()) ** 2 / sum(w**2 for w in weight.values()),
        "share_first": weight.get(0, 0.0),
        "share_near": sum(w for j, w in weight.items() if abs(j - row) < 64),
        "share_own": weight[row],
    }
    orders = {
        "drawn": sorted(keys, key=lambda j: draws[j]),
        "latest": sorted(keys, key=lambda j: abs(j - row)),
        "first_latest": sorted(keys, key=lambda j: abs(j - row) if j else -1),
        "heaviest": sorted(keys, key=lambda j: -weight[j]),
    }
    for policy, order in orders.items():
        gaps = [output(order[:n]) - output(keys) for n in lengths]
        found[f"squares_{policy}"] = [gap @ gap / spread if gap.any() else 0.0 for gap in gaps]
    return found


def captured(model, ids) -> list[Attention]:
    found: list[Attention] = []
    with capture(model, found.append), torch.no_grad():
        model(**ids)
    return found


NOTED = ("keys", "load", "load_with_first", "along", "effective", "share_first", "share_near", "share_own")
# With the size of the noise that is added to all weights: loads are then of the order of 2.
KINDS = {"llama": 0.3, "mistral": 0.3, "bert": 0.3, "gemma2": 0.3, "gpt_oss": 0.3, "t5": 0.08, "gpt2": 0.3, "vit": 0.3}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_noted_of_a_layer_is_what_a_plain_account_finds(kind):
    """Grouped keys, sliding windows, both directions, a cap, sinks, a position bias, a window without special rows."""
    model, inputs = small(kind)
    stream = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(KINDS[kind] * torch.randn(weight.shape, generator=stream))
    for name, tensor in inputs.items():
        if name.endswith("input_ids"):
            inputs[name] = torch.randint(3, 99, (1, 40), generator=stream)
        else:
            inputs[name] = tensor[:1]
    loads = []
    for attention in captured(model, inputs):
        heads, size = attention.q.shape[1], attention.k.shape[2]
        rows = [size // 20 + 1, size // 2, size - 2, size - 1]
        lengths = [1, 2, 3, 4, 8, 16, size]
        draws = torch.rand(len(rows), size, generator=stream)
        with torch.no_grad():
            found = queries.notes(attention, torch.tensor(rows), draws, lengths)
            other = queries.load_and_effective(attention, torch.tensor(rows))
        plain = [[plain_query(attention, h, row, draws[i].numpy(), lengths) for i, row in enumerate(rows)]
                 for h in range(heads)]  # fmt: skip
        for name in NOTED:
            expected = [[each[name] for each in mine] for mine in plain]
            np.testing.assert_allclose(found[name], expected, rtol=2e-4, atol=2e-6, err_msg=f"{name} {attention.name}")
        for policy in POLICIES:
            expected = [np.mean([each[f"squares_{policy}"] for each in mine], 0) for mine in plain]
            np.testing.assert_allclose(found[f"squares_{policy}"], expected, rtol=1e-3, atol=2e-6, err_msg=policy)
            assert found[f"squares_{policy}"].shape == (heads, len(lengths))
        assert all(array.dtype == np.float64 for array in found.values())
        assert set(other) == {"load", "effective"}
        for name, array in other.items():
            np.testing.assert_allclose(array, found[name], rtol=1e-5, atol=1e-7)
        loads += list(found["load"].ravel())
    assert 0.5 < np.median(loads) < 6  # logits that matter, and do not decide it all


def synthetic(q, k, v, causal=False, **options) -> Attention:
    """Attention of one window from its queries (heads, n, d), keys and values (groups, m, d), and nothing else."""
    plain = dict.fromkeys(("mask", "position", "cap", "sinks", "window", "output"))
    return Attention(0, "made", q[None], k[None], v[None], **(plain | {"causal": causal} | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_positions_of_each_head_and_half_precision(dtype):
    """Four heads in two groups; each sees other keys, has other distances, and its own sink."""
    stream = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(count, 30, 8, generator=stream).to(dtype) for count in (4, 2, 2))
    seen = torch.rand(1, 4, 30, 30, generator=stream) < 0.6
    seen[:, 2:, :, 0] = False
    seen |= torch.eye(30, dtype=torch.bool)
    position = torch.randn(1, 4, 30, 30, generator=stream)
    lowest = torch.zeros(1, 4, 30, 30).masked_fill(~seen, torch.finfo(torch.float32).min)
    rows, lengths, sinks = [4, 17, 29], [1, 2, 4, 8, 30], torch.randn(4, generator=stream)
    draws = torch.rand(3, 30, generator=stream)
    for mask in (seen, lowest):
        attention = synthetic(q, k, v, mask=mask, position=position, sinks=sinks)
        found = queries.notes(attention, torch.tensor(rows), draws, lengths)
        for head in range(4):
            plain = [plain_query(attention, head, row, draws[i].numpy(), lengths) for i, row in enumerate(rows)]
            for name in NOTED:
                expected = [each[name] for each in plain]
                np.testing.assert_allclose(found[name][head], expected, rtol=2e-4, atol=2e-6, err_msg=name)
            for policy in POLICIES:
                expected = np.mean([each[f"squares_{policy}"] for each in plain], 0)
                np.testing.assert_allclose(found[f"squares_{policy}"][head], expected, rtol=1e-3, atol=2e-6)


def test_late_queries_are_spread_over_the_last_eighth_and_those_with_n_keys_have_them():
    for start, width, count in [(0, 64, 8), (1, 63, 100), (0, 1000, 7), (1, 999, 125), (3, 5, 2), (2, 1, 9)]:
        text = range(start, start + width)
        eighth = max(width // 8, 1)
        for causal, places in ((True, text[-eighth:]), (False, text)):
            rows = queries.late_queries(text, causal, count).tolist()
            assert len(rows) == len(set(rows)) == min(count, len(places)) and set(rows) <= set(places)
            assert rows == sorted(rows) and rows[-1] == text[-1]
            gaps = np.diff([places[0] - 1, *rows])
            assert gaps.max() - gaps.min() <= 1  # evenly
    for n in (64, 256):
        for start in (0, 1):
            rows = queries.queries_with(n, range(start, 300), 10).tolist()
            assert rows[-1] + 1 == n and len(rows) == 10  # a causal query at position i has i + 1 keys
            assert all(3 * n / 4 < row + 1 <= n for row in rows)
    assert queries.queries_with(64, range(0, 300), 100).tolist() == list(range(48, 64))


# ------------------------------------------------------------ the whole of it: tiny models

CONTEXT, WINDOWS, QUERIES, ERROR, SEED = 300, 3, 5, 0.3, 7
SIZES = dict(vocab_size=60, hidden_size=24, intermediate_size=16, num_hidden_layers=3, max_position_embeddings=320)
GROUPED = dict(SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=1, bos_token_id=2)


def tokenizer():
    found = Tokenizer(
        models.WordLevel({"<unk>": 0, "<pad>": 1, "<s>": 2} | {f"w{i}": i for i in range(3, 60)}, "<unk>")
    )
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, **names)


@cache
def tiny(kind: str = "Llama", **options) -> loading.TextModel:
    """A language model of three layers with four heads in two groups, and a window that begins with a token."""
    config = getattr(transformers, f"{kind}Config")(**GROUPED | options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return loading.TextModel("tiny", model, tokenizer(), None)


IDS = np.random.default_rng(5).integers(3, 60, WINDOWS * CONTEXT)


def probed(model=None, **options) -> pd.DataFrame:
    numbers = {"context": CONTEXT, "windows": WINDOWS, "queries": QUERIES, "error": ERROR, "seed": SEED}
    return probe_in_context(model or tiny(), IDS, **(numbers | options))


@cache
def whole() -> pd.DataFrame:
    return probed()


def same(one: pd.DataFrame, two: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, two, check_exact=True)


COLUMNS = (
    "layer head group keys load load_05 load_95 load_with_first reduced phase effective share_first share_near "
    "share_own load_64 effective_64 load_256 effective_256 error_drawn_64 error_drawn_256 error_latest_64 "
    "error_latest_256 error_first_latest_64 error_first_latest_256 error_heaviest_64 error_heaviest_256 law_64 law_256 "
    "keys_drawn keys_drawn_low keys_drawn_high keys_latest keys_latest_low keys_latest_high keys_first_latest "
    "keys_first_latest_low keys_first_latest_high keys_heaviest keys_heaviest_low keys_heaviest_high"
).split()


def test_the_table_has_its_rows_and_columns_in_order():
    table = whole()
    assert list(table.columns) == COLUMNS
    assert list(zip(table["layer"], table["head"], table["group"])) == [
        (layer, head, head // 2) for layer in range(3) for head in range(4)
    ]
    # The text of a window is all but its first token: late queries are those of the last 37 of positions 1 to 299.
    last = list(range(263, 300))
    rows = [last[37 * (i + 1) // 5 - 1] for i in range(5)]
    assert (table["keys"] == np.median(rows) + 1).all()
    assert table.notna().all(axis=None)
    assert set(table.attrs) == {"seconds_model", "seconds_statistics", "left_out"}


def plain_needed(lengths, squares, error):
    """From how many keys on, a real number, the error stays below: halving the last gap in which it is too large."""
    above = [i for i, square in enumerate(squares) if square > error**2]
    if not above:
        return 1.0
    few, many, total = *lengths[above[-1] :][:2], lengths[-1]
    at_few, at_many = squares[above[-1] :][:2]

    def square(n):
        if at_many < 1e-10:
            return at_few * (1 / n - 1 / many) / (1 / few - 1 / many)
        left = [1 / m - 1 / total for m in (n, few, many)]
        return at_few * (left[0] / left[1]) ** (math.log(at_few / at_many) / math.log(left[1] / left[2]))

    low, high = float(few), float(many)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if square(middle) > error**2 else (low, middle)
    return high


def plain_row(every: list[dict], early: dict[int, list[dict]], lengths: list[int], error: float) -> dict:
    """A row of the table from `plain_query` of all its late queries, a list for each window."""
    flat = [query for window in every for query in window]
    of = lambda name: np.array([query[name] for query in flat])  # noqa: E731
    keys, load = np.median(of("keys")), np.median(of("load"))
    reduced = load / math.sqrt(2 * math.log(keys))
    row = {"keys": keys, "load": load, "load_with_first": np.median(of("load_with_first")), "reduced": reduced}
    row |= {"load_05": np.quantile(of("load"), 0.05), "load_95": np.quantile(of("load"), 0.95)}
    row |= {"phase": "averaging" if reduced < 0.5 else "extremal" if reduced < 1 else "frozen"}
    row |= {"effective": np.median(of("effective"))}
    row |= {name: np.mean(of(name)) for name in ("share_first", "share_near", "share_own")}
    for n, found in early.items():
        row |= {f"{name}_{n}": np.median([query[name] for query in found]) for name in ("load", "effective")}
    for policy in POLICIES:
        windows = np.array([[query[f"squares_{policy}"] for query in window] for window in every]).mean(1)
        mean = windows.mean(0)
        row |= {f"error_{policy}_{n}": math.sqrt(mean[lengths.index(n)]) for n in (64, 256)}
        fewer = [n for n in lengths if n < keys]
        windows = np.concatenate([windows[:, : len(fewer)], np.zeros((len(windows), 1))], 1)  # all are read at the end
        value = plain_needed([*fewer, int(keys)], windows.mean(0), error)
        others = [np.delete(windows, i, 0).mean(0) for i in range(len(windows))]
        logs = [math.log(plain_needed([*fewer, int(keys)], other, error)) for other in others]
        reach = stats.t.ppf(0.975, len(logs) - 1) * math.sqrt((len(logs) - 1) * np.var(logs))
        ends = {"": value, "_low": value * math.exp(-reach), "_high": value * math.exp(reach)}
        row |= {f"keys_{policy}{end}": min(max(math.ceil(number), 1), keys) for end, number in ends.items()}
    return row


def test_every_number_of_the_table_is_that_of_the_plain_account():
    table, model, width = whole(), tiny().model, CONTEXT - 1
    last = list(range(263, 300))
    rows = [last[37 * (i + 1) // 5 - 1] for i in range(5)]
    early = {n: [((3 * n // 4) + (n // 4) * (i + 1) // 5) - 1 for i in range(5)] for n in (64, 256)}
    lengths = [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 300]
    asked = {(layer, head): ([], {64: [], 256: []}) for layer, head in ((0, 1), (1, 0), (2, 3))}
    for window in range(WINDOWS):
        ids = torch.tensor([[2, *IDS[window * width : (window + 1) * width]]])
        draws = torch.rand(QUERIES, CONTEXT, generator=runtime.stream(SEED, window)).numpy()
        for attention in captured(model, {"input_ids": ids}):
            for (layer, head), (late, others) in asked.items():
                if layer == attention.layer:
                    late.append([plain_query(attention, head, r, draws[i], lengths) for i, r in enumerate(rows)])
                    for n, some in early.items():
                        others[n] += [plain_query(attention, head, r, draws[0], []) for r in some]
    for (layer, head), (late, others) in asked.items():
        found = table.set_index(["layer", "head"]).loc[(layer, head)]
        for name, expected in plain_row(late, others, lengths, ERROR).items():
            if name.startswith("keys_"):  # a whole number may be the next one
                assert found[name] == pytest.approx(expected, rel=1e-3, abs=1.01), name
            else:
                assert found[name] == (expected if name == "phase" else pytest.approx(expected, rel=1e-3, abs=1e-5)), (
                    name
                )
        loads, along = (np.array([q[n] for window in late for q in window]) for n in ("load", "along"))
        laws = drawn_errors([64, 256], found["keys"], loads, along)
        assert found[["law_64", "law_256"]].tolist() == pytest.approx(list(laws), rel=1e-3)


def test_the_same_seed_has_the_same_numbers_and_another_draws_other_keys():
    table, other = probed(), probed(seed=SEED + 1)
    same(table, whole())
    drawn = [name for name in COLUMNS if "drawn" in name]
    assert not other["error_drawn_64"].equals(table["error_drawn_64"])
    same(other.drop(columns=drawn), table.drop(columns=drawn))
    wider = probed(error=2 * ERROR)
    needed = [f"keys_{policy}" for policy in POLICIES]
    assert (wider[needed] <= table[needed]).all(axis=None) and (wider[needed] < table[needed]).any(axis=None)


def test_some_layers_are_the_rows_of_the_whole():
    same(probed(layers=[1]), whole()[whole()["layer"] == 1].reset_index(drop=True))
    same(probed(layers=[2, 0]), whole()[whole()["layer"] != 1].reset_index(drop=True))


def test_one_window_has_no_interval():
    table = probed(windows=1)
    for policy in POLICIES:
        assert table[[f"keys_{policy}_low", f"keys_{policy}_high"]].isna().all(axis=None)
        assert table[f"keys_{policy}"].between(1, 300).all()


def test_a_sliding_window_is_all_that_its_queries_need():
    model = tiny("Mistral", sliding_window=20)
    table = probed(model)
    assert list(table.columns) == [*COLUMNS[:3], "window", *COLUMNS[3:]]
    assert (table["window"] == 20).all() and (table["keys"] == 20).all()
    assert table[["load_64", "effective_256"]].isna().all(axis=None)  # none of its queries has so many keys
    for policy in POLICIES:
        ends = table[[f"keys_{policy}{end}" for end in ("_low", "", "_high")]]
        assert ends.ge(1).all(axis=None) and ends.le(20).all(axis=None)
        assert (table[f"error_{policy}_64"] < 1e-6).all()
    for name in table.filter(like="first_latest"):  # the first position is out of sight
        assert table[name].equals(table[name.replace("first_", "")])
    assert (table["share_first"] == 0).all()
    assert table["law_64"].isna().all()


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "modernbert", "llama"])
def test_the_window_of_a_layer_is_the_most_keys_that_a_query_sees(kind):
    model, inputs = small(kind)
    for attention in captured(model, {name: ids[:1] for name, ids in inputs.items()}):
        most = attention.seen().sum(-1).max().item()
        found = queries.layer_notes(attention, range(12), torch.rand(12, 12), [1, 2, 12], ())
        assert (np.nan_to_num(found["window"], nan=12) == most).all()
        assert found["keys"].max() == most


def test_numbers_of_keys_are_whole_for_an_even_number_of_queries():
    table = probed(queries=4, windows=2)
    for name in ["keys", *(f"keys_{policy}" for policy in POLICIES)]:
        assert (table[name] % 1 == 0).all()


def test_a_model_that_overflows_is_refused(tmp_path):
    model = tiny(rms_norm_eps=1e-5)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match="^model: expected finite queries.*NaN or infinity in layers.1.self_attn$"):
        probed(model, checkpoint=tmp_path)
    assert not list(tmp_path.glob("window_*"))


def test_of_an_encoder_all_queries_see_all_keys():
    model = loading.load_model("minilm")
    ids = np.random.default_rng(1).integers(2000, 20_000, 2 * 62)
    table = probe_in_context(model, ids, 64, 2, 4, 0.2, layers=[0, 5])
    assert len(table) == 24 and (table["keys"] == 64).all() and (table["group"] == table["head"]).all()
    assert list(table.columns) == [name for name in COLUMNS if not name.endswith(("_64", "_256"))]


# ------------------------------------------------------------ killed, resumed, refused


class Passes:
    """Counts the windows that a model reads; may stop it in one of them."""

    def __init__(self, model, most=10**9):
        self.count, self.most = 0, most
        self.hook = model.model.register_forward_pre_hook(self.note)

    def note(self, *_):
        self.count += 1
        if self.count > self.most:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def test_a_probe_that_was_killed_goes_on_with_the_same_numbers(tmp_path):
    folder = tmp_path / "kept"
    with Passes(tiny(), most=2) as passes, pytest.raises(KeyboardInterrupt):
        probed(checkpoint=folder, plan=b"one")
    with Passes(tiny()) as passes:
        same(probed(checkpoint=folder, plan=b"one"), whole())
        assert passes.count == 1  # the first two were done
    files = sorted(folder.glob("window_*"))
    assert len(files) == WINDOWS and len(list(folder.iterdir())) == WINDOWS + 1
    files[-1].unlink()
    content = bytearray(files[0].read_bytes())
    content[len(content) // 2] ^= 1
    files[0].write_bytes(content)
    files[1].with_name(files[1].name + ".tmp").write_bytes(b"half")  # a window that was being written
    with Passes(tiny()) as passes:
        same(probed(checkpoint=folder, plan=b"one"), whole())
        assert passes.count == 2
    with Passes(tiny()) as passes:
        same(probed(checkpoint=folder, plan=b"one"), whole())
        assert passes.count == 0
    with Passes(tiny()) as passes:  # another plan: nothing of the first is used
        other = probed(checkpoint=folder, plan=b"two", seed=SEED + 1)
        assert passes.count == WINDOWS and not other["error_drawn_64"].equals(whole()["error_drawn_64"])
    (folder / "notes.txt").write_text("mine")
    discard_windows(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]  # what others have put there stays
    (folder / "notes.txt").unlink()
    discard_windows(folder)
    assert not folder.exists()


@pytest.mark.parametrize("layers", [[3], [0, 99]])
def test_a_layer_that_is_not_there_is_refused(layers, tmp_path):
    with pytest.raises(ValueError, match=f"^layers: expected layers with softmax attention, got {layers[-1]}$"):
        probed(layers=layers, checkpoint=tmp_path)
    assert not list(tmp_path.glob("window_*"))
    for wrong in (layers, [-1], []):  # and before any work
        with Passes(tiny()) as passes, pytest.raises(ValueError, match="^layers: expected"):
            question(tiny(), IDS, context=CONTEXT, windows=WINDOWS, layers=wrong)
        assert passes.count == 0


def text(table: pd.DataFrame) -> str:
    """All digits of a table."""
    return table.to_csv(index=False, float_format="%.17g")


RANKS = """
import sys
sys.path.insert(0, {root!r})
from tests.test_probe_context import probed, text
from tokcx_lib import runtime
from tokcx_lib.sampling import distributed
from pathlib import Path
with runtime.one_thread():
    table = probed(checkpoint=Path({folder!r}) / "kept", plan=b"ranks")
assert (table is None) == (distributed.rank() != 0)
if table is not None:
    (Path({folder!r}) / "heads.csv").write_text(text(table))
"""


@pytest.mark.slow
def test_two_ranks_make_the_table_of_one(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(RANKS.format(root=str(ROOT), folder=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "heads.csv").read_text() == text(whole())
    with Passes(tiny()) as passes:  # and one process goes on from what two have left
        same(probed(checkpoint=tmp_path / "kept", plan=b"ranks"), whole())
        assert passes.count == 0
