"""An evaluation as files: report.json for machines, report.html for people."""

from edgelora.report.page import report_html
from edgelora.report.record import Bytes, report_json

__all__ = ["Bytes", "report_html", "report_json"]
