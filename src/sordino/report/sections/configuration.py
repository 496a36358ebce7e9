"""The last sections: images that could not be used, and the configuration."""

from collections.abc import Sequence
from html import escape

from sordino.report.groups import Group
from sordino.report.markup import counted, html_table
from sordino.report.runs import Run

_LISTED_IMAGES = 200


def skipped(runs: Sequence[Run]) -> str:
    """Return the section on images that could not be used; nothing if there are none."""
    skipped = list(dict.fromkeys((image.name, image.reason) for run in runs for image in run.summary.images.skipped))
    if not skipped:
        return ""
    rows = [
        [f'<span class="words">{escape(name)}</span>', f'<span class="words">{escape(reason)}</span>']
        for name, reason in skipped[:_LISTED_IMAGES]
    ]
    more = f" The first {_LISTED_IMAGES} are listed." if len(skipped) > _LISTED_IMAGES else ""
    caption = f"{counted(len(skipped), 'image')} could not be used and took no part in these runs.{more}"
    table = html_table(caption, ["Image", "Reason"], rows, "Skipped images")
    return f'<section aria-labelledby="skipped"><h2 id="skipped">Skipped images</h2>\n{table}</section>\n'


def configuration(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """Return the section with the configuration of the first run, and what labels stand for."""
    first = runs[0]
    variants = [group for group in groups if group.difference]
    differences = "".join(f"<li>{escape(group.label)}: {escape(group.difference)}</li>\n" for group in variants)
    shortened = (
        f"<details><summary>What labels stand for</summary>\n<ul>{differences}</ul>\n</details>\n" if variants else ""
    )
    directory = escape(first.directory.name) + (f", the first of {len(runs)} runs" if len(runs) > 1 else "")
    return (
        '<section aria-labelledby="configuration"><h2 id="configuration">Configuration</h2>\n'
        f"{shortened}"
        f'<details><summary>config.toml of {directory}</summary>\n<pre tabindex="0"><code>{escape(first.config_text)}'
        "</code></pre></details></section>\n"
    )
