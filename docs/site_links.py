"""A hook of mkdocs: links to files outside docs/ work in a repository, and the site has no such files, so there they are plain text."""

import re
from pathlib import Path

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#]+)\)")


def on_page_markdown(markdown, page, config, **_):
    docs = Path(config["docs_dir"])

    def outside(match):
        target = (docs / page.file.src_uri).parent / match[2]
        return match[0] if target.resolve().is_relative_to(docs) else f"`{match[1].strip('`')}`"

    return LINK.sub(outside, markdown)
