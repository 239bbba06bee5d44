"""Every head of the packaged language model, over windows of articles, and over other kinds of text (chapter 14)."""

from __future__ import annotations

from tokcx_lib.models.loading import LANGUAGE, load_model
from tokcx_lib.studies.language_model.measures import window_table
from tokcx_lib.studies.language_model.texts import whole_windows
from tokcx_lib.studies.runs import Experiment, Part, Plan


def language_model_heads(config: dict, device) -> Plan:
    """All heads of the packaged language model on one kind of text: a window fills the context, and is a unit.

    Columns of `measures.window_table`.
    """
    model = load_model(LANGUAGE, device)
    ids, texts = whole_windows(model, config["corpus"], config["context"], config["windows"], config["seed"])

    def work(window: int) -> Part:
        table = window_table(model, ids[window].to(device), config["queries"], (config["seed"], window))
        table.insert(0, "window", window)
        return Part(table)

    return Plan([(w,) for w in range(config["windows"])], work, {"texts": texts, **model.provenance})


def language_model_domains(config: dict, device) -> Plan:
    """The same, over several texts, of which `domain` is the number in `corpora`."""
    model = load_model(LANGUAGE, device)
    found = [
        whole_windows(model, corpus, config["context"], config["windows"], config["seed"])
        for corpus in config["corpora"]
    ]

    def work(domain: int, window: int) -> Part:
        ids = found[domain][0][window].to(device)
        table = window_table(model, ids, config["queries"], (config["seed"], domain, window))
        table.insert(0, "domain", domain)
        table.insert(1, "window", window)
        return Part(table)

    units = [(d, w) for d in range(len(found)) for w in range(config["windows"])]
    texts = {name: sha256 for _, each in found for name, sha256 in each.items()}
    return Plan(units, work, {"texts": texts, **model.provenance})


EXPERIMENTS = {
    "language_model_heads": Experiment(
        language_model_heads,
        ("window",),
        full={"corpus": "wikipedia-en", "context": 8192, "windows": 8, "queries": 32, "seed": 20_271_400},
        quick={"corpus": "scipy-docs", "context": 1024, "windows": 2, "queries": 16},
        tolerance=2e-3,
    ),
    "language_model_domains": Experiment(
        language_model_domains,
        ("domain", "window"),
        full={
            "corpora": ["wikipedia-en", "wikipedia-de", "python-stdlib"],
            "context": 4096,
            "windows": 2,
            "queries": 32,
            "seed": 20_271_500,
        },
        quick={"corpora": ["scipy-docs", "python-stdlib"], "context": 512, "windows": 1, "queries": 16},
        tolerance=2e-3,
    ),
}
