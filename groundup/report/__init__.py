"""A run's folder as one page: `page.write_report` (HTML, no network) and `closing.closing_table` (for a terminal).

In: what the stages left in the run's folder; whatever is missing or unfinished is simply not shown.
Out: `runs/NAME/report.html`. Nothing here computes a result; figures are shown as the stages wrote them.
"""
