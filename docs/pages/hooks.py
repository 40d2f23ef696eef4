"""What MkDocs does beside writing docs/ as HTML.

It makes the reference of the code, draws the diagrams, and has pages load nothing from a network.
"""

# pyright: reportMissingImports=false
# The extra `docs` has them, which tests and checks do without.

import re
from collections.abc import Callable
from typing import Any

import mmdr
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

from docs.pages import commands_page, keys_page, metrics_page, options_page

GENERATED: dict[str, Callable[[], str]] = {
    "reference/keys.md": keys_page.text,
    "reference/options.md": options_page.text,
    "reference/commands.md": commands_page.text,
    "reference/metrics.md": metrics_page.text,
}
"""Pages that are made of the code, by their path in docs/."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    for path, text in GENERATED.items():
        files.append(File.generated(config, path, content=text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts a drawing in the place of each Mermaid diagram, so that no script has to be loaded."""
    return re.sub(r"```mermaid\n(.*?)```", _drawing, markdown, flags=re.DOTALL)


SEARCH_SCRIPT = "https://unpkg.com/iframe-worker/shim"
"""What the search loads to run from a file on the disk; docs/assets/ has it."""


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Has a page load the search's script from docs/assets/."""
    here = get_relative_url("assets/iframe-worker.js", page.url)
    return output.replace(SEARCH_SCRIPT, here)


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    """Has the page of wrong addresses do so too."""
    return output_content.replace(SEARCH_SCRIPT, "/assets/iframe-worker.js")


def _drawing(block: re.Match[str]) -> str:
    svg = mmdr.render(block[1]).svg()
    return f'<figure class="diagram">{" ".join(svg.split())}</figure>\n'
