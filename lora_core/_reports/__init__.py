"""The receipts that the verbs return; each prints as a table or a sentence."""

from lora_core._reports.adapter import EjectReport, LayerReport, Report, SaveReport
from lora_core._reports.algebra import AlgebraReport, LayerResult, Teller, Told
from lora_core._reports.merge import FileMergeReport, MergeReport
from lora_core._reports.summary import AdapterSummary, NormReport, Summary, idleness
from lora_core._reports.table import count, table

__all__ = [
    "AdapterSummary",
    "AlgebraReport",
    "EjectReport",
    "FileMergeReport",
    "LayerReport",
    "LayerResult",
    "MergeReport",
    "NormReport",
    "Report",
    "SaveReport",
    "Summary",
    "Teller",
    "Told",
    "count",
    "idleness",
    "table",
]
