"""Pages of the documentation that lie elsewhere in the repository, and what they link to."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them where they lie in the repository, so that their links hold."""
    paths = [ROOT / page for page in PAGES]
    paths += [ROOT / "benchmarks/README.md", *(ROOT / "benchmarks/results").rglob("*.*")]
    for path in sorted(paths):
        files.append(
            File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        )
    return files
