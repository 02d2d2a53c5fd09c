"""What MkDocs does beside building docs/*.md (mkdocs.yml names this file; it is no page).

docs/index.md is the one list of pages, with a line about each: the navigation, the pages' descriptions and llms.txt are
made of it. Pages that are made, not written: the notebook, the keys of every command, and what lies at the top of the
repository. Links that lead out of docs/ lead to these, or to copies of the files.
"""

import base64
import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
AT_THE_TOP = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
ENTRY = re.compile(r"^- \[(?P<title>[^\]]+)\]\((?P<link>[^)]+)\): (?P<about>.+)$")
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")
COMMANDS = ("distill", "train", "sample", "evaluate")
written: dict[str, str] = {}  # the pages' Markdown, by their place in the site


def listed() -> dict[str, list[tuple[str, str, str]]]:
    """Section -> (title, page, about) of every page that docs/index.md lists below a heading, in its order."""
    sections: dict[str, list[tuple[str, str, str]]] = {}
    heading = ""
    for line in (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif found := ENTRY.match(line):
            entry = found["title"], page_of(found["link"]), found["about"]
            sections.setdefault(heading, []).append(entry)
    return sections


def page_of(link: str) -> str:
    """A link of a page in docs/ as it is in the site: "../CONTRIBUTING.md" is a page there, the notebook another."""
    link = re.sub(r"\.ipynb$", ".md", link)
    if not link.startswith("../"):
        return link
    path = link.removeprefix("../")
    return AT_THE_TOP.get(path, f"files/{path}")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation."""
    sections = [{heading: [{title: page} for title, page, _ in pages]} for heading, pages in listed().items()]
    config.nav = [{"Home": "index.md"}, *sections]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is made, and the files that pages link to."""
    for source, page in AT_THE_TOP.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=from_the_top((ROOT / source).read_text("utf-8"))))
    for name, content in pages_of_the_notebook(ROOT / "docs" / "quickstart.ipynb").items():
        files.append(File.generated(config, name, content=content))
    outside = {path for page in (ROOT / "docs").glob("*.md") for path, _ in OUTSIDE.findall(page.read_text("utf-8"))}
    for path in sorted(outside - set(AT_THE_TOP)):
        if (ROOT / path).is_file():  # else MkDocs warns of the link
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def from_the_top(text: str) -> str:
    """A page of the top of the repository, whose links begin there, as one of docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    for source, page in AT_THE_TOP.items():
        text = re.sub(rf"\]\({source}", f"]({page}", text)
    return text


def keys() -> str:
    """What `--help` of the commands says: the rest of docs/keys.md."""
    from pdistill.commands import help as help_page

    texts = {"pdistill": help_page.overview()}
    texts |= {command: help_page.of_command(command, subcommand=True) for command in COMMANDS}
    return "".join(f"\n## {name}\n\n```\n{text}\n```\n" for name, text in texts.items())


def pages_of_the_notebook(path: Path) -> dict[str, str | bytes]:
    """The notebook as a page, and its pictures beside it."""
    page, files = [], {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            page.append(source)
            continue
        page.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            shown = output.get("data", {})
            if "image/png" in shown:
                name = f"quickstart-{len(files) + 1}.png"
                files[name] = base64.b64decode("".join(shown["image/png"]))
                page.append(f"![What the cell above shows]({name})")
            elif words := "".join(output.get("text", shown.get("text/plain", ""))).rstrip():
                page.append(f"```\n{words}\n```")
    return {"quickstart.md": "\n\n".join(page) + "\n", **files}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the site, and the description of the page."""
    markdown = OUTSIDE.sub(lambda link: f"]({page_of('../' + link[1])}{link[2] or ''})", markdown)
    markdown = re.sub(r"\]\(quickstart\.ipynb\)", "](quickstart.md)", markdown)
    abouts = {name: about for pages in listed().values() for _, name, about in pages}
    if page.file.src_uri == "keys.md":
        markdown += keys()
    page.meta.setdefault("description", abouts.get(page.file.src_uri, config.site_description))
    written[page.file.src_uri] = markdown
    return markdown


def on_post_build(config: MkDocsConfig) -> None:
    """llms.txt (llmstxt.org), and the Markdown that it names, beside the pages."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    lines += [f"- [{config.site_name}](index.md): the start page"]
    for heading, pages in listed().items():
        lines += ["", f"## {heading}", ""]
        for title, name, about in pages:
            made_here = name in written and "\n::: " not in written[name]  # else the page is made of docstrings
            lines.append(f"- [{title}]({name if made_here else name.replace('.md', '.html')}): {about}")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, markdown in written.items():
        if "\n::: " not in markdown:
            (site / name).write_text(markdown, encoding="utf-8")
