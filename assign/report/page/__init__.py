"""One page about one plan, for a browser: no network, light and dark, readable on a phone.

``page`` assembles it; ``rows``: every tensor; ``runs``: results of trainings; ``points``: other plans; ``figures``,
``curves``: the charts, as plain data; ``colours``: their colours. ``template.html``, ``style.css`` and ``script.js``
are the page itself.
"""

from assign.report.page.page import Report, check_libraries, write_report

__all__ = ["Report", "check_libraries", "write_report"]
