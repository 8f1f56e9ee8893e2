"""A run in one page."""
from pathlib import Path
def write(folder: Path) -> Path:
    (folder/"report.html").write_text("x")
    return folder/"report.html"
