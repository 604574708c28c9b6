"""PSG, table A2: independent beside directional scaling, ResNet-18, 2-bit weights, 8-bit inputs.

The paper's schedule (90 epochs, the last 15 with PSG at learning rate 0.001, no weight decay
there) and network on CIFAR-100: its ImageNet numbers stand beside ours for their order alone. The
strengths are searched by appendix G, with the first seed.
"""

import functools

from experiments.psg import protocol, strength_search

TITLE = "PSG, table A2: independent and directional scale, ResNet-18, W2A8 (CIFAR-100)"
PAPER = {"independent": (63.35, 54.96), "directional": (63.18, 56.60)}  # ImageNet
CANDIDATES = {"independent": (100.0, 300.0, 1000.0), "directional": (1.0, 5.0, 25.0)}
BITS = 2


def run(context):
    """Yields both scales, each at the strength that the search chose."""
    parts = protocol.make(
        context,
        "cifar100",
        "resnet18",
        rates={0: 0.1, 30: 0.01, 60: 0.001},
        switch=75,
        end=90,
    )
    deployed = protocol.grid(BITS, ends=8)
    search = strength_search.begin(parts, context.seeds[0])
    strengths = {}
    for kind, candidates in CANDIDATES.items():
        late = functools.partial(psg, kind=kind, seed=context.seeds[0])
        found = search.choose(candidates, late, deployed)
        strengths[kind] = found.strength
        yield found.row | {"kind": kind}
    for seed in context.seeds:
        start = parts.plain(seed)
        for kind, (full, low) in PAPER.items():
            trained = psg(parts, start, strengths[kind], kind, seed)
            yield {
                "row": kind,
                "bits": BITS,
                "seed": seed,
                "strength": strengths[kind],
                **parts.scores(trained, deployed),
                **parts.with_activations(trained, deployed, 8),
                "paper": {"full precision": full, "accuracy": low},
            }


def psg(parts, start, strength, kind, seed):
    """Returns the variables after the epochs of PSG with a kind of scale."""
    chain = protocol.psg(
        protocol.grid(BITS, momentum=0.1, ends=8),
        strength,
        weight_decay=0.0,
        directional=kind == "directional",
    )
    return parts.late(kind, chain, start, seed)
