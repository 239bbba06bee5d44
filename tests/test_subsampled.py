"""An encoder that reads some of its keys: the model's own output where it reads all, and loops over lists where not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from tokcx_lib import runtime
from tokcx_lib.models import architectures, subsampled
from tokcx_lib.models.loading import TextModel

SIZES = dict(vocab_size=60, hidden_size=24, intermediate_size=16, num_hidden_layers=2, max_position_embeddings=40)
KINDS = {
    "Bert": dict(SIZES, num_attention_heads=3),
    "Roberta": dict(SIZES, num_attention_heads=3, pad_token_id=1),
    "DistilBert": dict(vocab_size=60, dim=24, n_layers=2, n_heads=3, hidden_dim=16, max_position_embeddings=40),
}
PIECES = [np.arange(5, 5 + n) % 50 + 5 for n in (7, 20, 1, 12)]
MINE = {"keys": 4, "seed": 3}


def small(kind="Bert"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind])
    body = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokenizer = SimpleNamespace(cls_token_id=2, sep_token_id=3, pad_token_id=config.pad_token_id)
    return TextModel(kind, body, tokenizer, None)


def own_output(model, batch):
    with torch.no_grad():
        return model.model(batch.ids, attention_mask=batch.real.long(), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_special", [True, False])
def test_with_every_key_it_is_the_models_own_output(kind, keep_special):
    model = small(kind)
    batch = subsampled.contexts(model, PIECES, 30)
    own = own_output(model, batch)
    for keys, weighted in ((None, False), (22, False), (1000, True)):
        states, embedding = subsampled.encode(model, batch, keys, 0, keep_special, weighted=weighted)
        assert len(states) == len(own) == 3
        for mine, theirs in zip(states, own):
            assert (mine - theirs)[batch.real].abs().max() < 1e-5
        for row, real, unit in zip(own[-1], batch.real, embedding):
            mean = row[real].mean(0)
            assert torch.allclose(unit, mean / mean.norm(), atol=1e-5)


def test_the_embedded_model_with_every_key(minilm):
    texts = ["A short one.", "Attention reads the keys of its context, and a subsample of them reads fewer. " * 4]
    batch = subsampled.contexts(minilm, texts)
    own = own_output(minilm, batch)
    encoded = subsampled.encode(minilm, batch, 254, 1)
    for mine, theirs in zip(encoded.states, own):
        assert (mine - theirs)[batch.real].abs().max() < 1e-5
    fewer = subsampled.encode(minilm, batch, 8, 1)
    # The short text has no more than 8 tokens, so it reads them all; the long one does not.
    gap = (fewer.embedding - encoded.embedding).norm(dim=-1)
    assert gap[0] < 1e-5 < 0.05 < gap[1]


def layer_by_hand(layer, x, lists, heads):
    """A BERT layer on one context (n, d), float64, attention over lists of keys, head by head and query by query."""
    own = layer.attention.self
    q, k, v = ((x @ m.weight.double().T + m.bias.double()).chunk(heads, -1) for m in (own.query, own.key, own.value))
    out = torch.zeros_like(x)
    size = q[0].shape[1]
    for h in range(heads):
        for i in range(len(x)):
            logits = torch.stack([q[h][i] @ k[h][j] / size**0.5 for j in lists])
            weights = logits.exp() / logits.exp().sum()
            out[i, h * size : (h + 1) * size] = sum(w * v[h][j] for w, j in zip(weights, lists))
    x = layer.attention.output.double()(out, x)
    return layer.output.double()(layer.intermediate.double()(x), x)


@pytest.mark.parametrize("keep_special", [True, False])
def test_against_loops_over_lists_of_keys(keep_special):
    model, other = small(), small()
    batch = subsampled.contexts(model, PIECES, 30)
    drawn = subsampled.draw_keys(batch, **MINE, layers=2, keep_special=keep_special)
    encoded = subsampled.encode(model, batch, **MINE, keep_special=keep_special)
    other.model.double()
    for c in range(len(PIECES)):
        length = int(batch.real[c].sum())
        with torch.no_grad():
            x = other.model.embeddings(batch.ids[c : c + 1, :length])[0]
            for layer in range(2):
                lists = [j for j in range(length) if drawn[layer, c, j]]
                x = layer_by_hand(other.model.encoder.layer[layer], x, lists, 3)
                assert torch.allclose(encoded.states[layer + 1][c, :length].double(), x, atol=1e-5)
        assert torch.allclose(encoded.embedding[c].double(), x.mean(0) / x.mean(0).norm(), atol=1e-5)


def test_implementations_of_attention_agree():
    model = small()
    batch = subsampled.contexts(model, PIECES, 30)
    found = []
    for implementation in ("eager", "sdpa"):
        model.model.set_attn_implementation(implementation)
        found.append(subsampled.encode(model, batch, **MINE).embedding)
    assert torch.allclose(*found, atol=1e-5)


def test_how_many_keys_and_which():
    batch = subsampled.contexts(small(), PIECES, 30)
    text = batch.real & ~batch.special
    lengths = text.sum(-1)
    assert lengths.tolist() == [7, 20, 1, 12] and (batch.special.sum(-1) == 2).all()
    kept = subsampled.draw_keys(batch, 5, 1, layers=3)
    assert ((kept & text).sum(-1) == torch.minimum(lengths, torch.tensor(5))).all()
    assert (kept & batch.special == batch.special).all() and not (kept & ~batch.real).any()
    free = subsampled.draw_keys(batch, 5, 1, layers=3, keep_special=False)
    assert (free.sum(-1) == torch.minimum(lengths + 2, torch.tensor(5))).all() and not (free & ~batch.real).any()
    each = subsampled.draw_keys(batch, torch.tensor([1, 2, 3, 4]), 1, layers=3)
    assert (each & text).sum(-1).tolist() == [[1, 2, 1, 4]] * 3


def test_draws_are_uniform_fresh_and_nested():
    batch = subsampled.contexts(small(), [np.arange(5, 15)] * 500, 30)
    text = (batch.real & ~batch.special)[0]
    drawn = subsampled.draw_keys(batch, 3, 5, layers=6)[:, :, text].double()
    # 3,000 draws of 3 of 10: each key in 3 of 10, each pair in 3 x 2 of 10 x 9; four standard errors.
    flat = drawn.reshape(-1, 10)
    assert (flat.mean(0) - 0.3).abs().max() < 4 * (0.21 / 3000) ** 0.5
    pairs = (flat.T @ flat / 3000)[~torch.eye(10, dtype=torch.bool)]
    assert (pairs - 6 / 90).abs().max() < 4.5 * (6 / 90 * (1 - 6 / 90) / 3000) ** 0.5
    # Draws of different layers, and of different contexts, agree as often as chance says: 3 x 3 / 10 keys in common.
    for one, other in ((drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:])):
        assert abs((one * other).sum(-1).mean() - 0.9) < 0.06
    more = subsampled.draw_keys(batch, 6, 5, layers=6)
    assert (more | ~subsampled.draw_keys(batch, 3, 5, layers=6)).all()


def test_layers_are_chosen_and_keep_their_draws():
    model = small()
    batch = subsampled.contexts(model, PIECES, 30)
    whole = subsampled.encode(model, batch)
    second = subsampled.encode(model, batch, **MINE, layers=[1])
    assert torch.equal(second.states[1], whole.states[1])
    assert not torch.allclose(second.states[2][1], whole.states[2][1], atol=1e-3)
    first = subsampled.encode(model, batch, **MINE, layers=[0])
    both = subsampled.encode(model, batch, **MINE)
    assert torch.equal(first.states[1], both.states[1])
    assert torch.equal(subsampled.encode(model, batch, **MINE, layers=[]).embedding, whole.embedding)
    again = subsampled.encode(model, batch, 4, runtime.generator(3))
    assert torch.equal(again.embedding, both.embedding)


def test_weights_undo_a_draw_of_half_of_equal_keys():
    """A context of pairs of equal keys, one of each pair drawn: with weights, exactly the attention of all of them."""
    model = small()
    with torch.no_grad():
        model.model.embeddings.position_embeddings.weight.zero_()
    batch = subsampled.contexts(model, [[5, 5, 9, 9, 20, 20]], 30)
    whole = subsampled.encode(model, batch)
    seed = next(
        s for s in range(1000)
        if (subsampled.draw_keys(batch, 3, s, 2)[:, 0, 1:7].reshape(2, 3, 2).sum(-1) == 1).all()
    )  # fmt: skip
    some = subsampled.encode(model, batch, 3, seed, weighted=True)
    assert torch.allclose(some.embedding, whole.embedding, atol=1e-5)
    plain = subsampled.encode(model, batch, 3, seed)
    assert not torch.allclose(plain.embedding, whole.embedding, atol=1e-3)


def test_padding_changes_nothing():
    model = small()
    together = subsampled.encode(model, subsampled.contexts(model, PIECES, 30)).embedding
    alone = [subsampled.encode(model, subsampled.contexts(model, [piece], 30)).embedding for piece in PIECES]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(4))


def test_long_texts_are_cut_and_bad_input_is_named():
    model = small()
    assert subsampled.contexts(model, [np.arange(5, 55)], 12).ids.tolist() == [[2, *range(5, 15), 3]]
    batch = subsampled.contexts(model, PIECES, 30)
    for call, name in (
        (lambda: subsampled.contexts(model, [], 30), "texts"),
        (lambda: subsampled.contexts(model, [[]], 30), "texts"),
        (lambda: subsampled.contexts(model, PIECES, 2), "context"),
        (lambda: subsampled.contexts(model, PIECES, 41), "context"),
        (lambda: subsampled.encode(model, batch, 0, 1), "keys"),
        (lambda: subsampled.encode(model, batch, 2.5, 1), "keys"),
        (lambda: subsampled.encode(model, batch, torch.tensor([1, 2]), 1), "keys"),
        (lambda: subsampled.encode(model, batch, 3, 1, layers=[2]), "layers"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()
    decoder = SimpleNamespace(config=SimpleNamespace(model_type="gpt2"))
    with pytest.raises(ValueError, match="^model: expected an encoder"):
        subsampled.contexts(SimpleNamespace(model=decoder), PIECES)
    assert architectures.is_causal(decoder.config)
