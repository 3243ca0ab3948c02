"""report.html (one file, nothing fetched), report.md with its pictures, results.json."""

import html
import json
from pathlib import Path
from typing import Any

from tinyclip.demo import figures
from tinyclip.demo.recipe import TEACHER, VARIANTS
from tinyclip.demo.runs import Scenes
from tinyclip.demo.summary import Row, gains, mean, select, verdicts
from tinyclip.models import CLIP
from tinyclip.models.files import write_json

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } figcaption { opacity: .75; font-size: .9rem; }
.plot { background: #fff; padding: .5rem; border-radius: .5rem; max-width: 100%; }
.scenes { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.scenes img { width: 100%; image-rendering: pixelated; } .scenes div { font-size: .85rem; }
.right { color: #16a34a; font-weight: 600; } .wrong { color: #dc2626; }
pre { overflow-x: auto; font-size: .8rem; } li { margin: .3rem 0; }
"""


def write(
    folder: Path, results: dict[str, Any], models: dict[str, CLIP], test: Scenes
) -> list[Path]:
    """Write the report of ``results["runs"]``; the pictures are of `models`, the first seed's.

    Returns:
        The files: results.json, report.md, report.html, and the pictures that report.md shows.
    """
    rows = results["runs"]
    noises = sorted({row["noise"] for row in rows})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    pictures = {
        **{_curve_name(noise): figures.curves(rows, noise) for noise in noises},
        "similarity.png": figures.similarities(models["both"], test),
    }
    for name, written in pictures.items():
        (folder / name).write_bytes(written)
    guesses = figures.guesses(models["both"], test)
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(_markdown(results, noises, guesses), encoding="utf-8")
    page.write_text(_page(results, noises, pictures, guesses), encoding="utf-8")
    return [folder / "results.json", markdown, page, *(folder / name for name in pictures)]


def claim(rows: list[Row]) -> list[str]:
    """The claim, a line each, marked with whether these runs bear it out."""
    return [f"{'yes' if good else 'no'}: {text}" for good, text in verdicts(rows)]


def table(rows: list[Row], noise: float = 0.0) -> list[list[str]]:
    """Header and rows: means over the seeds."""
    header = [
        "model",
        "zero-shot exact",
        "recall@1",
        "parameters",
        "M MACs a pair",
        "pairs/s",
        "steps",
        "seconds",
    ]
    lines = [header]
    for name in (TEACHER, *(variant.name for variant in VARIANTS)):
        if found := select(rows, name, 0.0 if name == TEACHER else noise):
            lines.append(
                [
                    name,
                    f"{mean(found, 'zero_shot_exact'):.1%}",
                    f"{mean(found, 'recall_at_1'):.1%}",
                    f"{found[0]['parameters']:,}",
                    f"{found[0]['macs'] / 1e6:.2f}",
                    f"{mean(found, 'pairs_per_second'):,.0f}",
                    f"{found[0]['steps']}",
                    f"{mean(found, 'seconds'):.0f}",
                ]
            )
    return lines


def gain_table(rows: list[Row], noise: float = 0.0) -> list[list[str]]:
    """Header and rows: gains in points, seed by seed, and their mean."""
    found = gains(rows, noise)
    seeds = [str(row["seed"]) for row in select(rows, "both", noise)]
    lines = [["gain in points", *(f"seed {seed}" for seed in seeds), "mean"]]
    for gain in found:
        points = [f"{value:+.1f}" for value in gain.points]
        lines.append([f"{gain.better} − {gain.than}", *points, f"{gain.mean:+.1f}"])
    return lines


def _curve_name(noise: float) -> str:
    return f"curves-noise{noise:g}.svg" if noise else "curves.svg"


def _seeds(results: dict[str, Any]) -> str:
    count = results["seeds"]
    return "one seed" if count == 1 else f"means of {count} seeds"


def _what(results: dict[str, Any]) -> str:
    recipe, first = results["recipe"], select(results["runs"], "both")[0]
    scenes = recipe["test_scenes"] or 4_000
    return (
        f"A CLIP (the teacher, {recipe['teacher_steps']} steps) and one small CLIP, trained in four"
        f" ways for {first['steps']} steps of {recipe['batch_size']} scenes each: from new or"
        " inherited weights, with CLIP's loss or with affinity mimicking. The figures are of"
        f" {scenes:,} test scenes made of handwriting that no model has seen ({_seeds(results)});"
        " the curves are of validation scenes, which is where settings were chosen."
    )


def _noise_words(noise: float) -> str:
    return f"{noise:.0%} of the students' training captions are wrong" if noise else ""


def _markdown(results: dict[str, Any], noises: list[float], guesses: list[dict[str, Any]]) -> str:
    rows = results["runs"]
    parts = ["# TinyCLIP on scanned digits", _what(results), _bullets(claim(rows))]
    for noise in noises:
        if noise:
            parts.append(f"## When {_noise_words(noise)}")
        parts += [_pipes(table(rows, noise)), _pipes(gain_table(rows, noise))]
        parts.append(f"![accuracy against steps]({_curve_name(noise)})")
    parts += ["## Similarities", "![cosines of scenes and captions](similarity.png)"]
    parts.append("## Unseen scenes, and what the student `both` reads")
    parts.append(
        _pipes(
            [["scene shows", "first guess", "second", "third"]]
            + [[g["truth"], *(f"{c} ({p:.0%})" for c, p in g["guesses"])] for g in guesses]
        )
    )
    parts += ["## Environment", f"```json\n{json.dumps(results['environment'], indent=2)}\n```"]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _pipes(lines: list[list[str]]) -> str:
    header, *body = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))


def _page(
    results: dict[str, Any],
    noises: list[float],
    pictures: dict[str, bytes],
    guesses: list[dict[str, Any]],
) -> str:
    rows, say = results["runs"], html.escape
    parts = [f"<h1>TinyCLIP on scanned digits</h1><p>{say(_what(results))}</p>"]
    parts.append(f"<ul>{''.join(f'<li>{say(line)}</li>' for line in claim(rows))}</ul>")
    for noise in noises:
        if noise:
            parts.append(f"<h2>When {say(_noise_words(noise))}</h2>")
        parts += [_html_table(table(rows, noise)), _html_table(gain_table(rows, noise))]
        drawn = pictures[_curve_name(noise)].decode()
        drawn = drawn[drawn.index("<svg") :].replace("<svg", '<svg class="plot"', 1)
        parts.append(
            f"<figure>{drawn}<figcaption>Accuracy on validation scenes against steps.</figcaption>"
            "</figure>"
        )
    parts.append(
        "<h2>Similarities</h2><figure><img class='plot' alt='a matrix, bright on its diagonal'"
        f" src='{figures.data_uri(pictures['similarity.png'])}'><figcaption>Cosines of the student"
        " <i>both</i>: unseen scenes and their own captions.</figcaption></figure>"
    )
    parts.append("<h2>Unseen scenes, and what the student <i>both</i> reads</h2>")
    parts.append(f"<div class='scenes'>{''.join(map(_html_guess, guesses))}</div>")
    environment = json.dumps(results["environment"], indent=2)
    parts.append(f"<h2>Environment</h2><pre>{say(environment)}</pre>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><title>TinyCLIP on scanned digits"
        f"</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _html_table(lines: list[list[str]]) -> str:
    header, *body = ([html.escape(cell) for cell in line] for line in lines)
    head = "".join(f"<th>{cell}</th>" for cell in header)
    rows = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in line)}</tr>" for line in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _html_guess(guess: dict[str, Any]) -> str:
    lines = "".join(
        f"<div class='{'right' if caption == guess['truth'] else 'wrong'}'>"
        f"{html.escape(caption)} {odds:.0%}</div>"
        for caption, odds in guess["guesses"]
    )
    source = figures.data_uri(guess["png"])
    return f"<div><img src='{source}' alt='{html.escape(guess['truth'])}'>{lines}</div>"
