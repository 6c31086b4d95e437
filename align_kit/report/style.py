"""The style sheet of a page: two sets of colours, the reader's choice of light or dark, one column or two."""

from __future__ import annotations

# Eight hues that stay apart for colour-blind eyes (after Okabe and Ito, "Color universal design", 2008), each in a
# darker shade on white and a lighter one on black.
_LIGHT = ("#0067a5", "#cf5300", "#00805c", "#b4478a", "#806000", "#3a9ad9", "#6a4fc4", "#5f6b76")
_DARK = ("#5fb0f2", "#ff9055", "#3ecf9f", "#f19bcb", "#e3c34d", "#9bdcff", "#b6a1ff", "#aab4be")


def _hues(colours: tuple[str, ...]) -> str:
    return "".join(f"--s{place}:{colour};" for place, colour in enumerate(colours))


COLOURS = f"""
:root{{color-scheme:light dark;--ink:#1c2430;--dim:#5a6675;--rule:#d8dee6;--page:#fff;--card:#f5f7fa;
--link:#0067a5;{_hues(_LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--ink:#e4e9f0;--dim:#9aa6b5;--rule:#38424f;--page:#12161c;--card:#1b212a;
--link:#7cc0f5;{_hues(_DARK)}}}}}
"""
# Of a plot that is a file of its own, on whatever colour it is shown.
PICTURE = f"""{COLOURS}svg{{stroke-linejoin:round;font-family:system-ui,sans-serif}}svg text{{fill:var(--ink)}}"""
# Of parts of a text: how they look beside each other, told by more than the colour.
_LOOKS = {
    "label": "color:var(--dim);font-size:.75rem",
    "plain": "",
    "dim": "color:var(--dim)",
    "green": "color:var(--s2);font-weight:600",
    "blue": "color:var(--s0)",
    "struck": "color:var(--s1);text-decoration:line-through",
    "boxed": "background:var(--rule);border-radius:.25rem;padding:.05rem .2rem",
}
LOOKS = tuple(_LOOKS)
_LOOK_RULES = "\n".join(f".look-{place}{{{rule}}}" for place, rule in enumerate(_LOOKS.values()))
CSS = f"""{COLOURS}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:1.5rem 1.25rem 4rem;max-width:72rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}}
h1{{margin:0;font-size:1.7rem;line-height:1.2;overflow-wrap:anywhere}}
h2{{margin:2.5rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--rule);font-size:1.2rem}}
p{{margin:.5rem 0;max-width:48rem;white-space:pre-line;overflow-wrap:anywhere}}
.subtitle{{color:var(--dim)}}
nav{{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;margin-top:.75rem;font-size:.92rem}}
a{{color:var(--link);text-decoration:none}}a:hover{{text-decoration:underline}}
dl{{display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:.75rem;margin:1.25rem 0}}
dl div{{padding:.6rem .8rem;border-radius:.5rem;background:var(--card)}}
dt{{color:var(--dim);font-size:.82rem}}
dd{{margin:0;font-size:1.05rem;font-weight:600;overflow-wrap:anywhere}}
.figures{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.25rem 1.75rem;
margin:1rem 0}}
figure{{margin:0;max-width:36rem}}
figcaption,caption{{color:var(--dim);font-size:.86rem;text-align:left}}
caption{{padding-bottom:.4rem}}
svg{{display:block;width:100%;height:auto;stroke-linejoin:round}}
svg text{{fill:currentColor;font-family:inherit}}
.wide{{overflow-x:auto;margin:.75rem 0}}
table{{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.35rem .8rem .35rem 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;
white-space:pre-wrap;overflow-wrap:break-word}}
th{{color:var(--dim);font-weight:600}}
.n{{text-align:right;white-space:nowrap}}
pre{{overflow-x:auto;margin:.75rem 0;padding:.75rem 1rem;border-radius:.5rem;background:var(--card);
font:.84rem/1.45 ui-monospace,"Cascadia Mono",Menlo,"DejaVu Sans Mono",monospace}}
.blocks{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr));gap:.75rem;
margin:1rem 0 1.5rem}}
.blocks pre{{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:20rem;overflow-y:auto}}
.marked{{white-space:pre-wrap;overflow-wrap:anywhere}}
{_LOOK_RULES}
h3{{margin:0 0 .25rem;color:var(--dim);font-size:.82rem;font-weight:400}}
ul{{margin:.5rem 0;padding-left:1.2rem;max-width:48rem}}
summary{{cursor:pointer;color:var(--link)}}
@media print{{nav{{display:none}}section{{break-inside:avoid}}}}
"""
