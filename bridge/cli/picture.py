"""The picture of a chain: loss and accuracy by height, blocks coloured by winner."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from traincert.bridge.chain import CertifiedBlock

MAX_NAMED = 10  # as many winners get a colour and a place in the legend


def draw_picture(
    path: Path, chain: Sequence[CertifiedBlock], metric: str, values: Sequence[float], names: Mapping[bytes, str]
) -> None:
    """Write a PNG.

    `values` has the metric of the model before the first block and after each block, on validation examples. `names`
    has the winners' names by their key.
    """
    certificates = [each.certificate for each in chain]
    heights = [certificate.height for certificate in certificates]
    first = heights[0] - 1
    losses = [certificates[0].loss_before, *(certificate.loss_after for certificate in certificates)]

    figure = Figure(figsize=(9, 5), layout="constrained")
    loss_axis = figure.add_subplot()
    loss_axis.plot([first, *heights], [loss / 1e9 for loss in losses], color="0.6", zorder=1)
    winners = list(dict.fromkeys(certificate.winner_key for certificate in certificates))
    for i, winner in enumerate(sorted(winners, key=lambda key: names[key])):
        won = [c for c in certificates if c.winner_key == winner]
        loss_axis.scatter(
            [c.height for c in won],
            [c.loss_after / 1e9 for c in won],
            s=80,
            marker="s",
            color=colormaps["tab10"](i % MAX_NAMED),
            label=f"{names[winner]}: {len(won)} blocks" if len(won) > 1 else f"{names[winner]}: 1 block",
            zorder=2,
        )
    loss_axis.set_yscale("log")
    loss_axis.yaxis.set_major_formatter("{x:g}")
    loss_axis.set_xlabel("height")
    loss_axis.set_ylabel("validation loss (nats)")
    loss_axis.set_xticks([first, *heights][:: 1 + len(heights) // 25])
    loss_axis.grid(axis="y", which="both", alpha=0.2)

    metric_axis = loss_axis.twinx()
    metric_axis.plot([first, *heights], values, color="black", linestyle="--", label=f"{metric} (right)")
    metric_axis.set_ylabel(f"{metric} on validation examples")
    if all(0 <= value <= 1 for value in values):
        metric_axis.set_ylim(0, 1.02)

    handles, labels = loss_axis.get_legend_handles_labels()
    more_handles, more_labels = metric_axis.get_legend_handles_labels()
    shown = [*handles[:MAX_NAMED], *more_handles]
    loss_axis.legend(shown, [*labels[:MAX_NAMED], *more_labels], loc="center right", title="winner")
    loss_axis.set_title(f"Loss and {metric} of the model that each block commits to")
    figure.savefig(path, dpi=150)
