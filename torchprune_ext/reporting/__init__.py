"""What pruning did to a model, tensor by tensor."""

from torchprune_ext.reporting.reading import report
from torchprune_ext.reporting.values import Count, Report, Row

__all__ = ["Count", "Report", "Row", "report"]
