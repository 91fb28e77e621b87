"""An evaluation as files: report.json for machines, report.html for people."""

from edgelora.report.page import report_html
from edgelora.report.reading import read_report
from edgelora.report.record import Bytes, report_json

__all__ = ["Bytes", "read_report", "report_html", "report_json"]
