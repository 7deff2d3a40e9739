"""A profile as one HTML page without outside requests: where the time and the memory go, layer by layer.

The chart stacks forward, input gradient and weight gradient of each layer in model order, for the largest measured
configuration; whiskers show the spread. The table below holds every class and configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from stagewright.planner.documents import ConfigurationCost, ModelProfile, Recompute

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 960, 260, 70, 70
_COLOURS = {"forward": "#4477aa", "input gradient": "#ccbb44", "weight gradient": "#ee6677", "kept": "#228833"}
_MAX_BARS = 400

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.warning { border-left: 4px solid #cc6677; padding-left: .8rem; }
figure { margin: 1.5rem 0; overflow-x: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
""".strip()


def profile_html(profile: ModelProfile) -> str:
    """Return the page."""
    configuration = largest_configuration(profile)
    parts = [
        f"<h1>{escape(profile.name)}</h1>",
        _facts(profile),
        "".join(f'<p class="warning">{escape(text)}</p>' for text in profile.pedigree.warnings),
    ]
    if configuration is not None:
        microbatch, sequence, degree = configuration
        parts.append(
            f"<h2>Layers at microbatch {microbatch}, sequence {sequence}, tensor degree {degree}</h2>"
            + _time_chart(profile, configuration)
            + _memory_chart(profile, configuration)
        )
    parts.append("<h2>Classes</h2>" + _table(profile))
    title = escape(f"Profile of {profile.name}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def largest_configuration(profile: ModelProfile) -> tuple[int, int, int] | None:
    """Return the configuration with the most tokens that every measured class has, the least tensor degree first."""
    keys = [{cost.key for cost in value.costs} for value in profile.classes.values() if value.costs]
    common = set.intersection(*keys) if keys else set()
    return max(common, key=lambda key: (-key[2], key[0] * key[1], key), default=None)


def _facts(profile: ModelProfile) -> str:
    pedigree = profile.pedigree
    facts = {
        "device": pedigree.device,
        "load": f"{pedigree.num_busy_ranks} busy ranks of {pedigree.threads_per_rank} threads",
        "taken": pedigree.taken_at,
        "dtype": profile.dtype,
        "layers": str(profile.num_layers),
        "parameters": f"{profile.num_parameters:,}",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(pedigree.versions.items())),
        "clocks": ", ".join(f"{name} {value / 1e6:.0f} MHz" for name, value in sorted(pedigree.clock_hz.items())),
    }
    return "<p>" + "<br>".join(f"{name}: {escape(value)}" for name, value in facts.items() if value) + "</p>"


def _cost(profile: ModelProfile, name: str, configuration: tuple[int, int, int]) -> ConfigurationCost | None:
    return next((cost for cost in profile.classes[name].costs if cost.key == configuration), None)


def _time_chart(profile: ModelProfile, configuration: tuple[int, int, int]) -> str:
    rows = []
    whiskers = []
    for name in profile.layer_classes:
        cost = _cost(profile, name, configuration)
        if cost is None:
            rows.append((0.0, 0.0, 0.0))
            whiskers.append((0.0, 0.0))
            continue
        rows.append((cost.forward_s * 1e3, cost.input_grad_s * 1e3, cost.weight_grad_s * 1e3))
        bounds = [
            cost.spread.get(field, (getattr(cost, field),) * 2)
            for field in ("forward_s", "input_grad_s", "weight_grad_s")
        ]
        whiskers.append((sum(low for low, _ in bounds) * 1e3, sum(high for _, high in bounds) * 1e3))
    names = ("forward", "input gradient", "weight gradient")
    return _bars(profile.layer_names, rows, [_COLOURS[name] for name in names], names, "ms", whiskers)


def _memory_chart(profile: ModelProfile, configuration: tuple[int, int, int]) -> str:
    rows = []
    for name in profile.layer_classes:
        cost = _cost(profile, name, configuration)
        rows.append((0.0 if cost is None else cost.activation_bytes[Recompute.NONE] / 2**20,))
    return _bars(profile.layer_names, rows, [_COLOURS["kept"]], ("kept for the backward",), "MiB", None)


def _bars(
    names: Sequence[str],
    rows: Sequence[Sequence[float]],
    colours: Sequence[str],
    legend: Sequence[str],
    unit: str,
    whiskers: Sequence[tuple[float, float]] | None,
) -> str:
    shown = min(len(rows), _MAX_BARS)
    top = max(
        [*(sum(row) for row in rows[:shown]), *((high for _, high in whiskers[:shown]) if whiskers else ())], default=0
    )
    top = top or 1.0
    plot_height, plot_width = _HEIGHT - _BOTTOM, _WIDTH - _LEFT
    step = plot_width / max(shown, 1)

    def y(value: float) -> float:
        return plot_height - value / top * (plot_height - 12)

    shapes = []
    for index in range(shown):
        x, below = _LEFT + index * step, 0.0
        tip = escape(
            f"{names[index]}: " + ", ".join(f"{n} {v:.4g} {unit}" for n, v in zip(legend, rows[index], strict=True))
        )
        for value, colour in zip(rows[index], colours, strict=True):
            height = y(below) - y(below + value)
            shapes.append(
                f'<rect x="{x + step * 0.1:.2f}" y="{y(below + value):.2f}" width="{step * 0.8:.2f}" '
                f'height="{max(height, 0):.2f}" fill="{colour}"><title>{tip}</title></rect>'
            )
            below += value
        if whiskers is not None:
            low, high = whiskers[index]
            middle = x + step / 2
            shapes.append(
                f'<line x1="{middle:.2f}" x2="{middle:.2f}" y1="{y(low):.2f}" y2="{y(high):.2f}" stroke="currentColor"/>'
            )
    shapes += list(_axis(top, unit, y)) + list(_labels(names[:shown], step, plot_height))
    keys = "".join(
        f'<span class="key" style="background:{colour}"></span>{escape(name)}'
        for name, colour in zip(legend, colours, strict=True)
    )
    more = f" (the first {shown} of {len(rows)} layers)" if shown < len(rows) else ""
    return (
        f'<figure><figcaption>{keys}{more}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(", ".join(legend))} by layer">{"".join(shapes)}</svg></figure>'
    )


def _axis(top: float, unit: str, y: object) -> Iterable[str]:
    assert callable(y)
    for share in (0.0, 0.5, 1.0):
        value = top * share
        yield (
            f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y(value):.2f}" y2="{y(value):.2f}" stroke="#8886"/>'
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.2f}" text-anchor="end">{value:.3g} {unit}</text>'
        )


def _labels(names: Sequence[str], step: float, plot_height: float) -> Iterable[str]:
    every = max(1, int(14 / step) + 1)
    for index in range(0, len(names), every):
        x, y = _LEFT + (index + 0.5) * step, plot_height + 12
        text = names[index] if len(names[index]) <= 18 else names[index][:17] + "…"
        yield (
            f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="end" transform="rotate(-40 {x:.2f} {y:.2f})">{escape(text)}</text>'
        )


def _table(profile: ModelProfile) -> str:
    counts = {name: profile.layer_classes.count(name) for name in profile.classes}
    head = (
        "class", "layers", "parameters", "microbatch", "sequence", "tensor degree", "forward ms", "input grad ms",
        "weight grad ms", "spread", "kept MiB", "kept, full recomputation MiB", "workspace MiB", "source",
    )  # fmt: skip
    rows = []
    for name in dict.fromkeys(profile.layer_classes):
        value = profile.classes[name]
        for cost in value.costs:
            full = cost.activation_bytes.get(Recompute.FULL)
            cells = (
                name,
                f"{counts[name]}",
                f"{value.parameters:,}",
                *(str(part) for part in cost.key),
                f"{cost.forward_s * 1e3:.3f}",
                f"{cost.input_grad_s * 1e3:.3f}",
                f"{cost.weight_grad_s * 1e3:.3f}",
                f"{relative_spread(cost):.1%}",
                f"{cost.activation_bytes[Recompute.NONE] / 2**20:.3f}",
                "" if full is None else f"{full / 2**20:.3f}",
                f"{cost.workspace_bytes / 2**20:.3f}",
                cost.source.value,
            )
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return (
        "<table><thead><tr>"
        + "".join(f"<th>{cell}</th>" for cell in head)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def relative_spread(cost: ConfigurationCost) -> float:
    """Return the widest (p80 - p20) / value among the measured times of an entry; 0 where none was kept."""
    widths = [
        (high - low) / getattr(cost, field) for field, (low, high) in cost.spread.items() if getattr(cost, field) > 0
    ]
    return max(widths, default=0.0)
