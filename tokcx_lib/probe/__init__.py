"""The product behind ``tokcx probe``: how many tokens each head of a model needs on a text."""


def probe(
    model,
    text,
    *,
    tokenizer=None,
    windows=None,
    tokens=None,
    context=None,
    queries=None,
    error=None,
    layers=None,
    seed=0,
    device=None,
    dtype=None,
):
    """How many of its keys each head of a model needs on a text: one row a head.

    In context, unless `tokens` is given: the text is cut into windows that fill the context of the model, and late
    queries of each read the keys that they have. With `tokens`, the keys of that many tokens are pooled into one law,
    for models whose heads are bilinear forms: BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral and Qwen2.

        from tokcx_lib.probe import probe
        table = probe("smollm2", open("my_text.txt").read())

    Parameters
    ----------
    model : a name for `loading.load_model`, or a model of transformers; tokenizer : of such a model.
    text : a string, an iterable of its pieces, or token ids (n,).
    windows : how many to read, from the beginning of the text; default 4.
    tokens : how many tokens to pool.
    context : tokens that the model sees at once; default 2048 (pooled: 256), or as many as it can.
    queries : late queries of each window, default 32; pooled, tokens that stand for all queries, default 1024.
    error : root mean square error of a head's output that the budgets are for, in units of the spread of its values;
        default 0.1.
    layers : numbers from 0, default all; seed : of keys and queries that are drawn.
    device, dtype : where the model runs, and its precision, if it is loaded here.

    Returns
    -------
    DataFrame
        With the columns of `context.probe_in_context` or of `pooled.pooled_probe`; None on ranks other than the first,
        under ``torchrun``.

    Raises
    ------
    ValueError
        If the model cannot be read, a number is out of range, or the text is too short.
    """
    from tokcx_lib.models.loading import as_text_model
    from tokcx_lib.probe.question import question

    numbers = {"windows": windows, "tokens": tokens, "context": context, "queries": queries, "error": error}
    return question(as_text_model(model, tokenizer, device, dtype), text, **numbers, layers=layers, seed=seed).answer()
