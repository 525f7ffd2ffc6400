"""Ranks that died, in sentences."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hpcasync.launched import place_of
from hpcasync.rules import RULES


def death_sentences(deaths: Sequence[dict[str, Any]], config: Mapping[str, Any], began: float | None) -> list[str]:
    """Per death who, when and where, what was given free, and who has its data now.

    Args:
        deaths: as ``hpcasync.train.survive`` keeps them, or ``hpcasync.launched``: those after which the job was started again.
        config: of the run, as far as it is known.
        began: the first step, seconds since 1970; None if that is not known.
    """
    rule = RULES.get(str(config.get("rule")))
    bounded = config.get("staleness") is not None or (rule is not None and rule.default_staleness is not None)
    waited_for = ["its place in the bound on staleness"] * bounded + ["its turn"] * (rule is not None and rule.in_turn)
    whole = config.get("partition", "iid") == "iid"
    sentences = []
    for death in deaths:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(death["time"]))
        after = f" ({death['time'] - began:.1f} s after the first step)" if began is not None else ""
        if "epoch" not in death:
            sentences.append(
                f"Rank {death['rank']} died at {when}{after}: {death['cause']}. The job was started again afterwards, from a "
                "checkpoint that counts what the rank had done."
            )
            continue
        locks = [f"the lock of shard {k}, whose last update may be applied in part" for k in death["shards"]]
        free = ", ".join(locks + waited_for) or "nothing that others waited for"
        if death["epoch"] == config.get("epochs"):
            data = "the rest of its part of this epoch, the last one, was not trained on"
        else:
            how = "all samples dealt anew" if whole else "the others keep their own parts, with an equal share each of this one"
            data = f"the rest of its part of this epoch was not trained on; {how} from epoch {death['epoch'] + 1} on"
        sentences.append(
            f"Rank {death['rank']} died at {when}{after} in {place_of(death)}, with "
            f"{death['updates']} updates made of {death['samples']} samples. Given free: {free}. Its data: {data}."
        )
    return sentences
