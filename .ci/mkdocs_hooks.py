"""For `make docs`: README.md as the first page, its neighbours, and links to files that the site does not have."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]


def on_files(files: Files, config: Any) -> Files:
    for name, page in {"README.md": "index.md", "CONTRIBUTING.md": None, "CHANGELOG.md": None}.items():
        content = (REPOSITORY / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page or name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a file beside docs/ becomes the name of the file; one to a file that is not there is an error."""

    folder = (REPOSITORY / "docs" / page.file.src_path).parent

    def name_only(link: re.Match[str]) -> str:
        text, target = link.groups()
        file = (folder / target).resolve()
        if file.is_relative_to(REPOSITORY / "docs"):
            return link.group()  # another page
        if not file.exists():
            raise PluginError(f"{page.file.src_path} links to {target}, which is not in the repository")
        return text

    if page.file.src_path == "api.md":
        package = (REPOSITORY / "torchrec_lma" / "__init__.py").read_text()
        exported = re.findall(r'^    "(\w+)",$', package, re.MULTILINE)
        if missing := [name for name in exported if f".{name}\n" not in markdown]:
            raise PluginError(f"api.md lacks {missing}, which torchrec_lma exports")
    return re.sub(r"\[([^\]]*)\]\((\.\./[^)#]*)\)", name_only, markdown)
