"""The report: figures, pictures, tables and the page."""
